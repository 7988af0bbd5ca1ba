"""Evaluates a run's checkpoint and writes eval/STEP.json: python launch/evaluate.py --workdir runs/demo [--step N]

    python launch/evaluate.py --workdir runs/demo --tasks all --report
    python launch/evaluate.py --compare runs/a runs/b [--out comparison.html]

--config.FIELD=VALUE changes a field of the run's configuration for this evaluation, such as data.path or eval.groups.

Exit codes: 0 finished, 2 bad input, 1 anything else.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from llip_jax.command_line import run, split_overrides
from llip_jax.config import ConfigError, nearest


def main(argv: list[str]) -> int:
    """Flags in, one call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", type=Path, help="run directory")
    what.add_argument("--compare", type=Path, nargs="+", metavar="W", help="evaluated run directories, side by side")
    parser.add_argument("--step", type=int, help="checkpoint to evaluate (default: the newest)")
    parser.add_argument("--tasks", help="comma-separated, or 'all' (default: the run's eval.tasks)")
    parser.add_argument("--report", action="store_true", help="write report/index.html (extra 'report')")
    parser.add_argument("--out", type=Path, help="page of --compare (default: report/comparison.html of the first run)")
    words, overrides = split_overrides(argv)
    args = parser.parse_args(words)
    if args.compare:
        from llip_jax.report import write_comparison

        out = args.out or args.compare[0] / "report" / "comparison.html"
        print(f"comparison: {write_comparison(args.compare, out)}")
        return 0
    # Imports of jax only where something is evaluated.
    from llip_jax.evaluate import TASKS, evaluate_run

    results = evaluate_run(args.workdir, args.step, overrides, args.tasks and _tasks(args.tasks, TASKS))
    if args.report:
        from llip_jax.report import write_report

        print(f"report: {write_report(args.workdir, results['step'])}")
    return 0


def _tasks(words: str, known: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tasks that --tasks names."""
    named = known if words == "all" else tuple(word.strip() for word in words.split(","))
    for word in named:
        if word not in known:
            raise ConfigError(
                f"--tasks: no task {word!r}.{nearest(word, [*known, 'all'])} Known: all, {', '.join(known)}"
            )
    return named


if __name__ == "__main__":
    sys.exit(run(main))
