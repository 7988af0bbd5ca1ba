"""What can be known to fail fails before anything is rented."""

import argparse
import contextlib
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from braceexpand import braceexpand

from llip_jax.command_line import split_overrides
from llip_jax.config import Config, ConfigError, SourceConfig
from llip_jax.config_files import load

MOUNT = "/mnt/llip"
"""Where the hosts have the storage."""


def check_place(name: str, zone: str) -> None:
    """A name that Cloud TPU takes, and something that looks like a zone.

    Raises:
        ConfigError: it is not.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise ConfigError(
            f"NAME is {name!r}, expected lower-case letters, digits and -, a letter first, as in llip-g14"
        )
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z0-9]+", zone):
        raise ConfigError(f"--zone is {zone!r}, expected a zone, as us-west4-a")


def check_storage(url: str | None) -> str:
    """The URL to mount.

    Raises:
        ConfigError: neither a whole bucket nor a share of an NFS server.
    """
    url = (url or "").rstrip("/")
    if not re.fullmatch(r"gs://[^/\s]+|nfs://[^/\s]+/\S+", url):
        raise ConfigError(
            f"--storage is {url!r}, expected gs://BUCKET or nfs://HOST/SHARE, mounted at {MOUNT};"
            f" folders of a bucket are found there as {MOUNT}/FOLDER"
        )
    return url


def check_training(words: Sequence[str], root: Path) -> None:
    """Flags of launch/train.py that can be given to all hosts alike, and a configuration that finds its data there.

    Args:
        words: the flags.
        root: of the repository, from where the hosts read the configuration file.

    Raises:
        ConfigError: they cannot work; argparse exits where a flag is not known.
    """
    # The flags of launch/train.py that name processes are left out: TPU hosts know each other.
    parser = argparse.ArgumentParser(prog="launch/train.py", add_help=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--profile")
    others, overrides = split_overrides(words)
    args = parser.parse_args(others)
    if not _mounted(args.workdir):
        raise ConfigError(f"--workdir is {args.workdir!r}, expected a folder under {MOUNT}, which outlives the slice")
    with contextlib.chdir(root):
        config = load(args.config, overrides)
    for field, source in _sources(config):
        _check_source(field, source)


def _sources(config: Config) -> Iterator[tuple[str, SourceConfig]]:
    if config.data.mixture:
        yield from ((f"data.mixture.{name}", part) for name, part in config.data.mixture.items())
    else:
        yield "data", config.data


def _check_source(field: str, source: SourceConfig) -> None:
    if source.source == "toyworld":
        return
    if not source.path:
        raise ConfigError(f"{field}.path: '' is not valid: expected the data to train on, under {MOUNT}")
    if source.source == "tfds":  # the path is a data set's name
        return
    for name in ("path", "eval_path"):
        for path in _alternatives(getattr(source, name)):
            if "://" not in path and not _mounted(path):
                raise ConfigError(
                    f"{field}.{name}: {path!r} is not on the hosts: expected a path under {MOUNT}, or a URL"
                )


def _alternatives(pattern: str) -> list[str]:
    """As llip_jax.data.files.find_files understands it: commas within braces do not separate."""
    with contextlib.suppress(ValueError):  # a brace too many, which the run itself tells
        return [path.strip() for path in braceexpand(f"{{{pattern},}}", escape=False) if path.strip()]
    return [pattern]


def _mounted(path: str) -> bool:
    return posixpath.normpath(path).startswith(f"{MOUNT}/")
