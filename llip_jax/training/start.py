"""Where a run starts from: random parameters, or the weights that ``init.from`` names."""

import math
import os
from collections.abc import Mapping
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from llip_jax.config import Config, ConfigError, resolve, to_dict
from llip_jax.config_files import merged
from llip_jax.data.sources import build_source
from llip_jax.interop import formats
from llip_jax.interop.surgery import Adapted, adapt, adapted_config, check_fit
from llip_jax.interop.weights import Weights, sections
from llip_jax.models.dual_encoder import abstract_model
from llip_jax.parallel import processes
from llip_jax.training import run_directory

RUN = "run"
"""Weights.format of a run directory."""


def read_weights(path: str | Path, activation: str | None = None) -> Weights:
    """Weights of a run directory (its newest checkpoint), of RUN/checkpoints/STEP, or of any format of interop.

    ``activation`` is for a file of OpenCLIP without configuration, which does not say it.

    Raises:
        ConfigError: there are none, or they cannot be used.
    """
    path = Path(path)
    step = int(path.name) if path.parent.name == "checkpoints" and path.name.isdigit() else None
    workdir = path if step is None else path.parent.parent
    workdir = workdir.parent if workdir.name == "checkpoints" else workdir
    if not (workdir / "checkpoints").is_dir():
        return formats.read(path, activation)
    # Orbax takes seconds to import, and only runs need it.
    from llip_jax.training.checkpoints import Checkpoints

    if not (workdir / "config.json").is_file():
        raise ConfigError(f"{workdir}: checkpoints without the run's config.json say nothing")
    config = run_directory.read_config(workdir)
    tokenizer = run_directory.tokenizer_file(workdir)
    if tokenizer is None and config.data.tokenizer.name == "trained":
        raise ConfigError(f"{workdir}: tokenizer.json is missing, without which its text tower means nothing")
    with closing(Checkpoints(workdir / "checkpoints", config.checkpoint, read_only=True)) as checkpoints:
        step = checkpoints.latest if step is None else step
        if step is None or step not in checkpoints.steps:
            there = checkpoints.steps or "none"
            raise ConfigError(f"{path}: no checkpoint{'' if step is None else f' {step}'}; there are: {there}")
        here = SingleDeviceSharding(jax.local_devices()[0])
        shapes = nnx.to_pure_dict(nnx.state(abstract_model(config), nnx.Param))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
        params = jax.tree.map(np.asarray, checkpoints.restore_params(step, abstract))
    fixed = sections(to_dict(config))
    if tokenizer is not None:
        fixed["data"]["tokenizer"]["name"] = str(tokenizer)
    source = f" from {Path(config.init.source).name}" if config.init.source else ""
    history = f"Trained by llip_jax for {step:,} steps of {config.train.batch_size:,} images{source}."
    return Weights(fixed, params, tokenizer, RUN, history=(history,))


def completed(raw: Mapping[str, Any], workdir: Path | None) -> dict[str, Any]:
    """A raw configuration whose gaps ``init.from`` fills: the model, and how to train it by the number of samples.

    A run that goes on takes them from its own config.json, so that it needs its source no more.

    Raises:
        ConfigError: weights or data cannot be read.
    """
    path = raw.get("init", {}).get("from")
    if not path:
        return dict(raw)
    if workdir is not None and processes.same((workdir / "config.json").exists()):
        before = to_dict(run_directory.read_config(workdir))
        # The same place by another name is no other source.
        same = os.path.abspath(path) == os.path.abspath(before["init"]["from"])
        return merged(before, merged(raw, {"init": {"from": before["init"]["from"]}}) if same else raw)
    weights = read_weights(path, raw.get("model", {}).get("activation"))
    whole = adapted_config(raw, weights.config)
    config = resolve(whole)
    check_fit(weights.params, resolve(weights.config), config)
    if not config.data.path and not config.data.mixture and config.data.source != "toyworld":
        raise ConfigError("data.path: '' is not valid: expected the data to train on")
    samples = len(build_source(config.data, "train", config.model.image_size))
    train = raw.get("train", {})
    defaults = fine_tuning(samples, train.get("batch_size"), train.get("steps"))
    if config.model.vision.big_vision is not None:
        defaults["optimizer"].pop("layer_decay")
    if weights.config["model"]["pooler"] != config.model.pooler:
        defaults["optimizer"]["rates"] = _new_rates(config)
    return merged(defaults, whole)


def fine_tuning(samples: int, batch_size: int | None = None, steps: int | None = None) -> dict[str, Any]:
    """How long and how carefully to fine-tune on so many samples, as a raw configuration.

    Small data is seen more often, in smaller batches, and moves the lower layers less.
    """
    batch = batch_size or 2 ** max(3, min(8, int(math.log2(max(samples, 1) / 8))))
    epochs = min(30.0, max(1.0, 30 * math.sqrt(1000 / samples)))
    steps = steps or max(50, math.ceil(epochs * samples / batch))
    return {
        "train": {"batch_size": batch, "steps": steps},
        "optimizer": {
            "learning_rate": 1e-4,
            "warmup_steps": steps // 10,
            "weight_decay": 0.05,
            "layer_decay": 0.75 if samples < 20_000 else 0.85,
        },
        "checkpoint": {"every_steps": max(50, steps // 5)},
        "eval": {"every_steps": max(50, steps // 5)},
    }


def _new_rates(config: Config) -> dict[str, float]:
    """Faster learning for what surgery made, but for what is frozen.

    New parameters start from noise, and each copy of a class token gets a share of its gradient.
    """
    rates = {"pooler/query": 10.0, "pooler/key": 10.0} if config.model.pooler == "mixer" else {}
    if config.model.pooler == "mixer" and config.model.mixer_key_bias:
        rates["pooler/key_bias"] = 10.0
    if config.init.tokens == "copies":
        rates["vision/tokens"] = 30.0
    return {path: rate for path, rate in rates.items() if not any(fnmatchcase(path, p) for p in config.train.frozen)}


def starting_params(config: Config) -> Adapted:
    """The parameters that ``init.from`` gives a run, on the host.

    Raises:
        ConfigError: weights that cannot be read or do not fit.
    """
    weights = read_weights(config.init.source, config.model.activation)
    return adapt(weights.params, resolve(weights.config), config)
