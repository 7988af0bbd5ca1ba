"""Evaluates a run's checkpoint and writes eval/STEP.json: python launch/evaluate.py --workdir runs/demo [--step N]

Exit codes: 0 finished, 2 bad input, 1 anything else.
"""

import argparse
import sys
from pathlib import Path

from llip_jax.command_line import run
from llip_jax.training.loop import evaluate_run


def main(argv: list[str]) -> int:
    """Flags in, one call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="run directory")
    parser.add_argument("--step", type=int, help="checkpoint to evaluate (default: the newest)")
    args = parser.parse_args(argv)
    evaluate_run(args.workdir, args.step)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
