"""Trains a model: python launch/train.py --config configs/llip_demo.py --workdir runs/demo [--config.FIELD=VALUE ...]

The same command goes on from the newest checkpoint after a stop. Exit codes: 0 finished, 2 bad configuration or input,
75 stopped by a signal after saving, 1 anything else.
"""

import argparse
import sys
from pathlib import Path

from llip_jax.command_line import run, split_overrides
from llip_jax.config import ConfigError, resolve
from llip_jax.config_files import read


def main(argv: list[str]) -> int:
    """Flags in, one call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", required=True, help="configuration file, with an optional variant: FILE.py[:VARIANT]"
    )
    parser.add_argument("--workdir", type=Path, help="run directory; created where missing, gone on with where not")
    parser.add_argument("--check", action="store_true", help="validate and print the parameter table, nothing else")
    words, overrides = split_overrides(argv)
    args = parser.parse_args(words)
    # Here, as data workers import this file too: they need no jax.
    from llip_jax.training.loop import check, train
    from llip_jax.training.start import completed

    config = resolve(completed(read(args.config, overrides), args.workdir))
    if args.check or config.train.steps == 0:
        print(check(config), end="")
        return 0
    if args.workdir is None:
        raise ConfigError("--workdir: expected a directory for the run")
    return train(config, args.workdir)


if __name__ == "__main__":
    sys.exit(run(main))
