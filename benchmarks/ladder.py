"""The Llip paper's ladder in small: SigLIP, registers, learned average, Llip, CLIP; with controls and error bars.

    python benchmarks/ladder.py --preset quick                          # about 20 minutes on 2 cores
    python benchmarks/ladder.py --preset full                           # and ablations: two hours
    python benchmarks/ladder.py --preset none --emoji FOLDER [--coco FOLDER]   # real pictures: about an hour
    python benchmarks/ladder.py --search [--emoji FOLDER]               # the trials behind the hyper-parameters

Appends one JSON line a run to --out and skips what is there already, so it may be stopped at any time. With --report it
also writes tables and plots of all that is there. What the figures mean: docs/results.md.
"""

import argparse
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from benchmarks.evidence.cases import Case, emoji_cases, preset, shares  # noqa: E402
from benchmarks.evidence.report import markdown, summary  # noqa: E402
from benchmarks.evidence.rows import read  # noqa: E402
from benchmarks.evidence.search import chosen, trials, without_test  # noqa: E402
from llip_jax.config import ConfigError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SEARCH = RESULTS / "ladder_search.jsonl"
_POLL_S = 1.0


def main(argv: Sequence[str]) -> int:
    """Flags in; 0, or 1 where a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=("quick", "full", "gpu", "smoke", "none"), default="quick", help="which runs"
    )
    parser.add_argument("--search", action="store_true", help="the trials of every rung instead")
    parser.add_argument("--emoji", default="", metavar="FOLDER", help="runs on emoji too: a folder with captions.jsonl")
    parser.add_argument("--coco", default="", metavar="FOLDER", help="photographs to evaluate the emoji runs on")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="paired seeds (default: 5)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a core; on a GPU one)")
    parser.add_argument("--out", type=Path, help="results (default: benchmarks/results/ladder.jsonl)")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write tables.md and plots")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {args.seeds}")
    for name, folder in {"--emoji": args.emoji, "--coco": args.coco}.items():
        if folder and not (Path(folder) / "captions.jsonl").is_file():
            parser.error(f"{name}: no captions.jsonl in {folder!r}")
    out = args.out or (SEARCH if args.search else RESULTS / "ladder.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.jobs is None:
        args.jobs = _usual_jobs()
    cases = _cases(args)
    if args.worker is not None:
        _work(shares(cases, args.jobs)[args.worker], out, args)
        return 0
    code = _run_all(cases, out, args, argv)
    rows = read(out)
    if not args.search:
        print(summary(rows))
    if args.report:
        from benchmarks.evidence.plots import plots  # needs matplotlib

        args.report.mkdir(parents=True, exist_ok=True)
        (args.report / "tables.md").write_text(markdown(rows))
        for path in plots(rows, args.report):
            print(path)
    return code


def _cases(args: argparse.Namespace) -> list[Case]:
    """What there is to do in all."""
    if args.search:
        return trials("emoji" if args.emoji else "toyworld")
    cases = [] if args.preset == "none" else preset(args.preset, range(args.seeds))
    if args.emoji:
        cases += emoji_cases(range(args.seeds), "smoke" if args.preset == "smoke" else "small")
    return cases


def _done(out: Path) -> set[str]:
    names = ("arm", "seed", "topics", "scale", "changes")
    return {Case(**{name: row[name] for name in names}).key() for row in (read(out) if out.exists() else [])}


def _run_all(cases: list[Case], out: Path, args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Starts the workers and shows what they have done; 1 where one failed."""
    wanted = {case.key() for case in cases}
    left = len(wanted - _done(out))
    print(f"{len(wanted)} runs, {len(wanted) - left} of them done before; results: {out}", flush=True)
    if not left:
        return 0
    jobs = min(args.jobs, left)
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--jobs", str(jobs)]
    workers = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        # What one worker has compiled serves the other.
        compiled = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
        for number in range(jobs):
            log = stack.enter_context(open(Path(folder) / f"{number}.log", "w+"))
            workers.append(
                (
                    subprocess.Popen(
                        [*command, "--worker", str(number)], env=os.environ | compiled, stdout=log, stderr=log
                    ),
                    log,
                )
            )
        try:
            with tqdm(total=left, unit="run", smoothing=0) as bar:
                while any(worker.poll() is None for worker, _ in workers):
                    time.sleep(_POLL_S)
                    bar.update(left - len(wanted - _done(out)) - bar.n)
        finally:
            for worker, _ in workers:
                worker.terminate()
        code = 0
        for worker, log in workers:
            if worker.wait():
                log.seek(0)
                print(log.read()[-4000:], file=sys.stderr)
                code = 1
    return code


def _work(cases: list[Case], out: Path, args: argparse.Namespace) -> None:
    """One worker's share, on cores of its own."""
    if hasattr(os, "sched_setaffinity") and args.jobs > 1:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[args.worker :: args.jobs] or cores)
    from benchmarks.evidence.runs import Bench

    with tempfile.TemporaryDirectory() as cache:
        emoji = args.emoji
        if emoji and args.search:
            emoji = str(without_test(Path(emoji), Path(cache) / "emoji"))
        bench = Bench({} if args.search else chosen(SEARCH), Path(cache), emoji, args.coco)
        for case in cases:
            if case.key() not in _done(out):
                _append(out, bench.run(case))


def _append(out: Path, row: dict[str, Any]) -> None:
    with out.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # workers share the file
        file.seek(0)
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)  # what a killed run left of a line
        file.write(json.dumps(row).encode() + b"\n")


def _usual_jobs() -> int:
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if jax.default_backend() == "cpu" else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"error: {error}")
