"""Evaluates a run's checkpoint and writes eval/STEP.json: python launch/evaluate.py --workdir runs/demo [--step N]

    python launch/evaluate.py --workdir runs/demo --tasks all --report
    python launch/evaluate.py --compare runs/a runs/b [--out comparison.html]

--config.FIELD=VALUE changes a field of the run's configuration for this evaluation, such as data.path or eval.groups.

Exit codes: 0 finished, 2 bad input, 1 anything else.
"""

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType
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
        if unused := [name for name in ("step", "tasks", "report") if getattr(args, name)] + overrides:
            raise ConfigError(f"{', '.join(unused)}: not with --compare, which shows what has been evaluated")
        out = args.out or args.compare[0] / "report" / "comparison.html"
        print(f"comparison: {_report().write_comparison(args.compare, out)}")
        return 0
    if args.out:
        raise ConfigError("--out: only with --compare")
    report = _report() if args.report else None  # before an evaluation that would be for nothing
    # Imports of jax only where something is evaluated.
    from llip_jax.evaluate import TASKS, evaluate_run

    tasks = None if args.tasks is None else _tasks(args.tasks, TASKS)
    results = evaluate_run(args.workdir, args.step, overrides, tasks)
    if report is not None:
        print(f"report: {report.write_report(args.workdir, results['step'])}")
    return 0


def _report() -> ModuleType:
    """The report package, which needs the extra of its name."""
    try:
        return importlib.import_module("llip_jax.report")
    except ImportError as error:
        raise ConfigError(f"a report needs {error.name}: pip install 'llip_jax[report]'") from None


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
