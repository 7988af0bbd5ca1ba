"""What a run will take, before it starts: python launch/plan.py --config configs/llip_g14.py --topology v5e:16x16

Compiles the exact training step with the TPU's own compiler, on any machine; opens no data but to fill in what a
configuration with init.from leaves out. Exit codes: 0 it fits (or nobody knows), 1 it does not, 2 bad configuration or
input.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # the devices of this machine are left alone

import argparse
import json
import sys
from pathlib import Path

from llip_jax.command_line import EXIT_FAILED, EXIT_FINISHED, run, split_overrides
from llip_jax.config import ConfigError, resolve
from llip_jax.config_files import read
from llip_jax.planning.plan import plan, to_json
from llip_jax.planning.search import search
from llip_jax.planning.table import ranking, table
from llip_jax.planning.target import parse_target
from llip_jax.training.metrics import progress_bar
from llip_jax.training.start import completed


def main(argv: list[str]) -> int:
    """Flags in, one call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration file: FILE.py[:VARIANT]")
    parser.add_argument("--topology", required=True, help="v5e:16x16, v5p:8x8x4, gpu:h100x8 (estimate), cpu:8")
    parser.add_argument(
        "--search", type=int, nargs="?", const=12, metavar="N", help="compile N settings (12), rank them"
    )
    parser.add_argument("--price", type=float, metavar="USD", help="of a chip for an hour")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that is known")
    parser.add_argument("--hlo", type=Path, metavar="FILE", help="write the compiled program's text")
    words, overrides = split_overrides(argv)
    args = parser.parse_args(words)
    config, target = resolve(completed(read(args.config, overrides), None)), parse_target(args.topology)
    if args.search is None:
        best = plan(config, target, args.hlo)
    else:
        with progress_bar(args.search, 0, "program", "compiling", keep=False) as bar:
            found = search(config, target, args.search, plan, bar)
        if not found.plans:
            raise ConfigError("--search: no setting can be compiled:\n" + "\n".join(found.left_out))
        print(ranking(found))
        best = found.best
    print(table(best, args.price), end="")
    if args.json is not None:
        args.json.write_text(json.dumps(to_json(best, args.price), indent=2) + "\n")
    return EXIT_FAILED if best.fits is False or best.failure else EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(run(main))
