"""Trains a model: python launch/train.py --config configs/llip_demo.py --workdir runs/demo [--config.FIELD=VALUE ...]

The same command goes on from the newest checkpoint after a stop. On several hosts it is started on each of them: TPU
pods, Slurm's srun, Open MPI and GKE say how many there are, elsewhere --coordinator, --processes and --process do. Exit
codes: 0 finished, 2 bad configuration or input, 75 stopped by a signal after saving, anything else: failed.
"""

import argparse
import os
import sys
from pathlib import Path

from llip_jax.command_line import run, split_overrides
from llip_jax.config import ConfigError, resolve
from llip_jax.config_files import read
from llip_jax.training.preemption import StopRequest


def main(argv: list[str]) -> int:
    """Flags in, one call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", required=True, help="configuration file, with an optional variant: FILE.py[:VARIANT]"
    )
    parser.add_argument("--workdir", type=Path, help="run directory; created where missing, gone on with where not")
    parser.add_argument("--check", action="store_true", help="validate and print the parameter table, nothing else")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps with jax's profiler")
    several = parser.add_argument_group("several processes, where the environment does not tell")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="a free port where process 0 runs")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are; 1: this one alone in any case")
    several.add_argument("--process", type=int, metavar="I", help="which one this is: 0 to N - 1")
    words, overrides = split_overrides(argv)
    args = parser.parse_args(words)
    with StopRequest() as stop:
        stop.begin()
        return _run(args, overrides, stop)


def _run(args: argparse.Namespace, overrides: list[str], stop: StopRequest) -> int:
    # Here, as data workers import this file too: they need no jax.
    from llip_jax.parallel.processes import ErrorBoard, ProcessFlags, start
    from llip_jax.training.loop import check, train
    from llip_jax.training.profiling import parse_profile
    from llip_jax.training.start import completed

    profile = range(0) if args.profile is None else parse_profile(args.profile)
    raw = read(args.config, overrides)
    flags = ProcessFlags(args.coordinator, 1 if args.check else args.processes, args.process)
    start(flags, os.environ, resolve({"faults": raw.get("faults", {})}).faults.process_s)
    with ErrorBoard():
        config = resolve(completed(raw, args.workdir))
        if args.check or config.train.steps == 0:
            print(check(config), end="")
            return 0
        if args.workdir is None:
            raise ConfigError("--workdir: expected a directory for the run")
        return train(config, args.workdir, profile=profile, stop=stop)


if __name__ == "__main__":
    sys.exit(run(main))
