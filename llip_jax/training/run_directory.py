"""The run directory's descriptive files: config.json, data.json and model.txt."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pydantic

from llip_jax.config import Config, ConfigError, TokenizerConfig, differences, resolve, to_dict
from llip_jax.data.records import fingerprint
from llip_jax.data.tokenizers import Tokenizer
from llip_jax.interop.files import replacing
from llip_jax.training.metrics import write_json
from llip_jax.training.state import TrainState

FIXED_FIELDS = (
    "seed",
    "train.batch_size",
    "train.frozen",
    "train.ema_decay",
    "init",
    "data",
    "objective",
    "model.image_size",
    "model.image_mean",
    "model.image_std",
    "model.text.length",
    "model.activation",
    "model.vision.activation",
    "model.vision.big_vision",
    "model.vision.pooling",
    "model.vision.token_weight",
    "model.text.activation",
    "model.text.causal",
    "model.text.pooling",
    "model.layer_norm_epsilon",
    "model.mixer_temperature",
    "model.patch_dropout",
)
"""What decides which samples a step sees and what it computes: a run cannot go on with any of these changed. (What
changes the parameters' shapes is told by the checkpoint itself.)"""

FREE_FIELDS = (
    "data.path",
    "data.eval_path",
    "data.mixture.*.path",
    "data.mixture.*.eval_path",
    "data.tfds.data_dir",
    "data.mixture.*.tfds.data_dir",
    "data.index_dir",
    "data.changed",
    "data.limits.replaced_share",
    "data.workers",
    "data.threads",
    "data.prefetch_batches",
    "data.label_field",
    "data.folder.eval_exclude",
    "data.mixture.*.folder.eval_exclude",
)
"""Exceptions: how fast data arrives, where it lies (its fingerprint is compared), and what is evaluated."""


TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""What a run's own tokenizer may be called: one it has learned, or a copy of the file that it was given."""

_CHANGES_SHOWN = 20
_DATA = pydantic.TypeAdapter(dict[str, dict[str, str]])


def prepare(workdir: Path, config: Config) -> None:
    """Creates the run directory or checks that this configuration may go on with the run in it; for one process.

    Says what else has changed since the run was last started.

    Raises:
        ConfigError: the directory cannot be written, or holds a run that differs in FIXED_FIELDS.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".write_test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--workdir: cannot write to {workdir}: {error.strerror}") from None
    if not (workdir / "config.json").exists():
        if weights := sorted(path.name for path in workdir.glob("*.safetensors")):
            raise ConfigError(f"--workdir: {workdir} holds weights ({weights[0]}); expected a folder for the run alone")
        # Left by a start that failed, perhaps with other data: a run's own tokenizer has a config.json beside it.
        for path in (workdir / name for name in TOKENIZERS):
            if path.absolute() != Path(config.data.tokenizer.name).absolute():
                path.unlink(missing_ok=True)
    else:
        changes = differences(read_config(workdir), config)
        lines = [line for line in changes if _within(line, FIXED_FIELDS) and not _within(line, FREE_FIELDS)]
        if changes and not lines:
            print("changed since the run was last started:\n" + "\n".join(f"  {line}" for line in changes))
            if any(_within(line, ("train.steps", "optimizer")) for line in changes):
                print("  (the learning rate follows the new schedule from here on)")
        if lines:
            raise ConfigError(
                f"--workdir: {workdir} holds a run that cannot go on with another configuration of its data or its "
                "computation; use a new directory, or set back:\n" + "\n".join(f"  {line}" for line in lines)
            )


def tokenizer_file(workdir: Path) -> Path | None:
    """The run's own tokenizer, where it has one."""
    return next((workdir / name for name in TOKENIZERS if (workdir / name).is_file()), None)


def keep_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Puts a copy of the tokenizer's file into the run directory, unless it is there."""
    if tokenizer.file is None:
        return
    name, definition = tokenizer.file
    if not (workdir / name).exists():
        with replacing(workdir / name) as temporary:
            temporary.write_bytes(definition)


def with_own_tokenizer(config: TokenizerConfig, workdir: Path) -> TokenizerConfig:
    """The run's own copy in place of a tokenizer file elsewhere, which may be gone."""
    own = tokenizer_file(workdir)
    return config if own is None or config.name in ("clip", "trained") else replace(config, name=str(own))


def describe(workdir: Path, config: Config, state: TrainState, identity: Mapping[str, str]) -> None:
    """Writes config.json, data.json and model.txt, once data and checkpoint are known to fit this configuration."""
    write_json(workdir / "config.json", to_dict(config))
    # What the newest checkpoint was made with stays until another one is.
    known = dict(list(_read_data(workdir).items())[-2:])
    write_json(workdir / "data.json", {**known, fingerprint(identity): dict(identity)})
    (workdir / "model.txt").write_text(parameter_table(state))


def data_changes(workdir: Path, before_fingerprint: str, identity: Mapping[str, str]) -> list[str]:
    """How the data differs from that of a checkpoint, by data.json, at most ``_CHANGES_SHOWN`` lines."""
    before = _read_data(workdir).get(before_fingerprint)
    if before is None:
        return ["(what it was is not known: data.json is missing or damaged)"]
    lines = [
        f"{name}: {before.get(name, 'was not there')} -> {identity.get(name, 'is gone')}"
        for name in dict.fromkeys((*before, *identity))
        if before.get(name) != identity.get(name)
    ]
    if not lines:
        return ["the same parts in another order"]
    more = len(lines) - _CHANGES_SHOWN
    return [*lines[:_CHANGES_SHOWN], f"... and {more} more"] if more > 0 else lines


def _read_data(workdir: Path) -> dict[str, dict[str, str]]:
    """Contents of data.json: fingerprint -> identity, the latest last."""
    try:
        return _DATA.validate_json((workdir / "data.json").read_bytes())
    except (OSError, ValueError):
        return {}


def read_config(workdir: Path) -> Config:
    """The configuration of a run.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = workdir / "config.json"
    try:
        return resolve(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"--workdir: no run in {workdir} (no config.json)") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def drop_later_evaluations(workdir: Path, step: int) -> None:
    """Removes evaluations of later steps than the one a run goes on from: it may reach them with other parameters."""
    for path in (workdir / "eval").glob("*"):
        if path.stem.isdigit() and int(path.stem) > step:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _within(difference: str, fields: tuple[str, ...]) -> bool:
    path = difference.partition(":")[0].split(".")
    return any(
        len(path) >= len(pattern := field.split("."))
        and all(wanted in (part, "*") for part, wanted in zip(path, pattern, strict=False))
        for field in fields
    )


def parameter_table(state: TrainState) -> str:
    """One line a parameter (shape, sharding, megabytes, share), then totals; works on abstract states."""
    rows = []
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append((name, str(list(x.shape)), str(x.sharding.spec), x.size))
    total = sum(size for *_, size in rows)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = []
    for name, dims, spec, size in rows:
        columns = f"{name:<{widths[0]}}  {dims:<{widths[1]}}  {spec:<{widths[2]}}"
        lines.append(f"{columns}  {size * 4 / 2**20:8.2f} MiB {size / total:7.2%}")
    lines.append(f"\nparameters: {total:,} ({total * 4 / 2**30:.3f} GiB in float32)")
    for part in ("vision", "text", "pooler"):
        lines.append(f"  {part}: {sum(x.size for x in jax.tree.leaves(state.params[part])):,}")
    lines.append(f"state (parameters and optimizer): {_bytes(state) / 2**30:.3f} GiB")
    lines.append(f"state on each device: {_bytes(state, per_device=True) / 2**30:.3f} GiB")
    return "\n".join(lines) + "\n"


def _bytes(tree: Any, per_device: bool = False) -> int:
    def size(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if per_device else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))
