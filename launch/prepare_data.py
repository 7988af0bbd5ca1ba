"""Turns any source into ArrayRecord shards, for quick random access, and counts what is in it:

python launch/prepare_data.py --config configs/llip_folder.py --config.data.path=DIR --split train --out SHARDS

Samples that cannot be used are left out and counted by reason. The folder also gets a manifest (shards.json),
statistics (statistics.json) and a page to look at them (index.html). The same command goes on after a stop; what comes
out does not depend on stops, on the number of processes or on the runner. Train from it with data.source=array_record
and data.path=SHARDS.

Exit codes: 0 finished, 2 bad configuration or input, 75 stopped by a signal, 1 anything else.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from llip_jax.command_line import EXIT_FINISHED, EXIT_STOPPED, run, split_overrides
from llip_jax.config import ConfigError
from llip_jax.config_files import load
from llip_jax.data.pipeline import build_tokenizer
from llip_jax.data.preparation.beam import write_with_beam
from llip_jax.data.preparation.local import write_locally
from llip_jax.data.preparation.shards import Preparation, alone, begin, finish
from llip_jax.data.sources import build_source
from llip_jax.training.metrics import progress_bar
from llip_jax.training.preemption import StopRequest

SHARD_SIZE = 10_000


def main(argv: list[str]) -> int:
    """Flags in, shards out."""
    words, beam_arguments = _split_beam(argv)
    words, overrides = split_overrides(words)
    args = _parser().parse_args(words)
    if beam_arguments and args.runner != "beam":
        raise ConfigError(f"{' '.join(beam_arguments)}: words after -- are for --runner beam")
    config = load(args.config, overrides)
    source = build_source(config.data, args.split, config.model.image_size)
    trained = config.data.tokenizer.name == "trained"  # belongs to a run and does not exist yet
    preparation = Preparation(
        source=source,
        split=args.split,
        out=args.out,
        shards=args.shards or max(1, -(-len(source) // (args.shard_size or SHARD_SIZE))),
        limits=config.data.limits,
        short_side=args.short_side,
        tokenizer=None if trained else build_tokenizer(config.data.tokenizer, source, "", config.model.text.length),
    )
    with alone(args.out):
        missing = begin(preparation, config.data)
        if args.runner == "beam":
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                write_with_beam(preparation, missing, beam_arguments)
            except KeyboardInterrupt:
                print("stopped: finished shards are kept, the same command goes on")
                return EXIT_STOPPED
        elif not _write_locally(preparation, missing, args.workers):
            return EXIT_STOPPED
        statistics = finish(preparation)
    print(f"{statistics.samples:,} samples: {statistics.kept:,} kept in {preparation.shards:,} shards")
    for reason, count in statistics.failed.items():
        print(f"  {count:,} left out: {reason}; first: {statistics.failures[reason][0]}")
    print(f"statistics: {preparation.out / 'index.html'}")
    which = "data.path" if args.split == "train" else "data.eval_path"
    print(f"to use them: data.source=array_record {which}={args.out}")
    return EXIT_FINISHED


def _write_locally(preparation: Preparation, missing: list[int], workers: int) -> bool:
    """With progress bar and signals; False when stopped by one."""
    total = len(preparation.source)
    done = total - sum(len(preparation.samples(shard)) for shard in missing)
    with StopRequest() as stop, progress_bar(total, done, "sample", "preparing") as bar:
        finished = write_locally(preparation, missing, workers, bar.update, lambda: stop.signal_name is not None)
    if not finished:
        print(f"stopped by {stop.signal_name}: finished shards are kept, the same command goes on")
    return finished


def _split_beam(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words before and after ``--``."""
    end = argv.index("--") if "--" in argv else len(argv)
    return argv[:end], argv[end + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s --config FILE [--config.FIELD=VALUE ...] --split SPLIT --out DIR [options] [-- BEAM OPTIONS]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="configuration file; its data fields name the source")
    parser.add_argument("--split", required=True, choices=("train", "eval"), help="which samples")
    parser.add_argument("--out", required=True, type=Path, help="folder of the shards, a new one for each split")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shard_size", type=_positive, help=f"samples of a shard, about (default: {SHARD_SIZE:,})")
    size.add_argument("--shards", type=_positive, help="number of shards, instead")
    parser.add_argument("--short_side", type=_positive, help="shrink images whose shorter side is larger, to JPEG")
    parser.add_argument("--runner", choices=("local", "beam"), default="local", help="processes here, or Apache Beam")
    parser.add_argument(
        "--workers", type=_positive, default=os.cpu_count() or 1, help="processes (default: one a CPU core)"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    sys.exit(run(main))
