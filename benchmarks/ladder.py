"""The Llip paper's ladder in small: SigLIP, registers, learned average, Llip, CLIP; with controls and error bars.

    python benchmarks/ladder.py --preset quick --out my.jsonl --report my-report   # 19 minutes on 2 cores
    python benchmarks/ladder.py --preset full ...                                  # and ablations: an hour
    python benchmarks/ladder.py --preset none --emoji FOLDER [--coco FOLDER] ...   # real pictures: 20 minutes
    python benchmarks/ladder.py --search [--emoji FOLDER] --out trials.jsonl       # the trials behind the settings
    python benchmarks/ladder.py --ways --emoji FOLDER --out ways.jsonl             # what was tried to win on emoji

Appends one JSON line a run to --out and skips what is there already, so it may be stopped at any time. With --report it
also writes tables and plots of all that is there. What the figures mean: docs/results.md. Linux and macOS.
"""

import argparse
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from benchmarks.evidence.cases import Case, digest, emoji_cases, groups, preset, shares, tuned_config  # noqa: E402
from benchmarks.evidence.report import markdown, summary  # noqa: E402
from benchmarks.evidence.rows import Rows, read  # noqa: E402
from benchmarks.evidence.search import chosen, trials, ways, without_test  # noqa: E402
from llip_jax.config import ConfigError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SEARCH = RESULTS / "ladder_search.jsonl"
_POLL_S = 1.0
Tuned = dict[str, dict[str, Any]]


def main(argv: Sequence[str]) -> int:
    """Flags in; 0, or 1 where a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = ("quick", "full", "gpu", "smoke", "none")
    parser.add_argument("--preset", choices=presets, default="quick", help="which runs on ToyWorld")
    parser.add_argument("--search", action="store_true", help="the trials of every rung instead")
    parser.add_argument("--ways", action="store_true", help="what else was tried for Llip on emoji")
    parser.add_argument("--emoji", default="", metavar="FOLDER", help="runs on emoji too: a folder with captions.jsonl")
    parser.add_argument("--coco", default="", metavar="FOLDER", help="photographs to evaluate the emoji runs on")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="paired seeds (default: 5)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a core; on a GPU one)")
    parser.add_argument("--out", type=Path, help="results (default: the committed ones, in benchmarks/results)")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write tables.md and plots")
    parser.add_argument("--worker", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    for name, folder in {"--emoji": args.emoji, "--coco": args.coco}.items():
        if folder and not (Path(folder) / "captions.jsonl").is_file():
            parser.error(f"{name}: no captions.jsonl in {folder!r}")
    if args.ways and not args.emoji:
        parser.error("--ways: expected --emoji beside it")
    args.search |= args.ways
    cases = _cases(args)
    if not cases:
        parser.error("--preset none: expected --emoji or --search beside it, there is nothing to run")
    name = "ladder_ways" if args.ways else "ladder_search" if args.search else "ladder"
    out = args.out or RESULTS / f"{name}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    tuned = {} if args.search else chosen(SEARCH, {case.data for case in cases if case.scale != "smoke"})
    if args.worker:
        return _work(*args.worker, out, tuned, args)
    code = _run_all(cases, out, tuned, args, argv)
    rows = _rows(out)
    if not args.search:
        print(summary(rows))
    if args.report:
        from benchmarks.evidence.plots import plots  # needs matplotlib

        args.report.mkdir(parents=True, exist_ok=True)
        (args.report / "tables.md").write_text(markdown(rows), encoding="utf-8")
        for path in plots(rows, args.report):
            print(path)
    return code


def _cases(args: argparse.Namespace) -> list[Case]:
    """What there is to do in all."""
    if args.ways:
        return ways()
    if args.search:
        return trials("emoji" if args.emoji else "toyworld")
    cases = [] if args.preset == "none" else preset(args.preset, range(args.seeds))
    if args.emoji:
        cases += emoji_cases(range(args.seeds), "smoke" if args.preset == "smoke" else "small")
    return cases


def _rows(out: Path) -> Rows:
    return read(out) if out.exists() else []


def _left(cases: Sequence[Case], out: Path, tuned: Tuned, *, coco: bool) -> list[Case]:
    """Cases without a row. Trials are told apart by what they change.

    Raises:
        ConfigError: a row is of another configuration.
    """
    found = {Case.of(row).key(): row for row in _rows(out)}
    left = []
    for case in cases:
        row = found.get(case.key())
        wanted = digest(tuned_config(case, tuned))
        if row is not None and row.get("config", wanted) != wanted:  # the first trials do not say
            raise ConfigError(f"--out: {out} holds {case.key()} of another configuration; expected another file")
        if row is None:
            left.append(case)
        elif coco and case.data == "emoji" and not any(name.startswith("coco_") for name in row["figures"]):
            raise ConfigError(f"--coco: {out} holds {case.key()} without photographs; expected another file")
    return left


def _run_all(cases: list[Case], out: Path, tuned: Tuned, args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Starts the workers and shows what they have done; 1 where a run failed."""
    left = _left(cases, out, tuned, coco=bool(args.coco))
    print(f"{len(cases)} runs, {len(cases) - len(left)} of them done before; results: {out}", flush=True)
    if not left:
        return 0
    jobs = min(args.jobs or _usual_jobs(), len(groups(left)))
    command = [sys.executable, str(Path(__file__).resolve()), *argv]
    before, wanted = len(cases) - len(left), {case.key() for case in cases}
    workers: list[tuple[subprocess.Popen[bytes], Path]] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are ended
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # What one worker has compiled serves the others; on a GPU they share its memory.
        shared = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
            **({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if jobs > 1 else {}),
        }
        try:
            with ExitStack() as stack:
                for number, share in enumerate(shares(left, jobs)):
                    own = folder / str(number)
                    own.mkdir()
                    plan = {"cases": [dataclasses.asdict(case) for case in share], "worker": number, "workers": jobs}
                    (own / "plan.json").write_text(json.dumps(plan))
                    log = stack.enter_context((own / "log").open("wb"))
                    words = ["--worker", str(own / "plan.json"), str(own)]
                    environment = os.environ | shared
                    workers.append(
                        (subprocess.Popen([*command, *words], env=environment, stdout=log, stderr=log), own / "log")
                    )
            with tqdm(total=len(left), unit="run", smoothing=0) as bar:
                while any(worker.poll() is None for worker, _ in workers):
                    time.sleep(_POLL_S)
                    done = len(wanted & {Case.of(row).key() for row in _rows(out)})
                    bar.update(done - before - bar.n)
        finally:
            for worker, _ in workers:
                worker.terminate()
            for worker, _ in workers:
                worker.wait()
        failed = [log for worker, log in workers if worker.returncode]
        for log in failed:
            print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
    return 1 if failed else 0


def _work(plan_file: Path, folder: Path, out: Path, tuned: Tuned, args: argparse.Namespace) -> int:
    """One worker's share, on cores of its own; 1 where a run failed, after the others."""
    plan = json.loads(plan_file.read_text())
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[plan["worker"] :: plan["workers"]] or cores)
    from benchmarks.evidence.runs import Bench

    emoji = args.emoji
    if emoji and args.search:
        emoji = str(without_test(Path(emoji), folder))
    bench, code = Bench(tuned, folder, emoji, args.coco), 0
    for fields in plan["cases"]:
        case = Case(**fields)
        try:
            _append(out, bench.run(case))
        except Exception:
            print(f"{case.key()} failed", file=sys.stderr)
            traceback.print_exc()
            code = 1
    return code


def _append(out: Path, row: dict[str, Any]) -> None:
    with out.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # workers share the file
        file.seek(0)
        *_, last = file.read().split(b"\n")
        if last:
            try:
                json.loads(last)
                file.write(b"\n")
            except ValueError:
                file.truncate(file.tell() - len(last))  # what a killed run left of a line
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()


def _usual_jobs() -> int:
    # In a process of its own: whoever asks jax has the accelerator.
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    backend = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[-1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if backend == "cpu" else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
