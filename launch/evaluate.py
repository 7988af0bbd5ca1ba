"""Evaluates a run's checkpoint and writes eval/STEP.json: python launch/evaluate.py --workdir runs/demo [--step N]

--config.FIELD=VALUE changes a field of the run's configuration for this evaluation, such as data.path or mesh.data.

Exit codes: 0 finished, 2 bad input, 1 anything else.
"""

import argparse
import sys
from pathlib import Path

from llip_jax.command_line import run, split_overrides
from llip_jax.training.loop import evaluate_run


def main(argv: list[str]) -> int:
    """Flags in, one call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="run directory")
    parser.add_argument("--step", type=int, help="checkpoint to evaluate (default: the newest)")
    words, overrides = split_overrides(argv)
    args = parser.parse_args(words)
    evaluate_run(args.workdir, args.step, overrides)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
