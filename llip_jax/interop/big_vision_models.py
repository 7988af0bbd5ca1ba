"""Our model under big_vision's trainers. (For its image models as towers of ours: models/big_vision.py.)

A big_vision configuration names our model like one of its own, once :func:`register` has been called::

    from llip_jax.interop import big_vision_models

    big_vision_models.register()
    config.model_name = "llip_jax"
    config.model = dict(  # fields of our section `model`, and two of `data.tokenizer`
        size="B/16", mixture_tokens=64, image_size=224, text=dict(length=64), vocabulary_size=32_000, pad=1)

or, starting from weights of any format that we read, with what they fix taken from them::

    source = formats.read(Path("siglip.npz")).config
    config.model = surgery.adapted_config({"model": {"pooler": "mixer"}}, source)["model"]
    config.model.update(vocabulary_size=32_000, pad=1)
    config.model_init = "siglip.npz"
    config.model_load = dict(dont_load=["log_scale", "bias"])

With the poolers class_token, registers and average, its trainers and evaluators run as they are. A mixer makes another
embedding of an image for every text, so that ``zimg`` is None; its trainer takes the logits of all pairs instead of
multiplying embeddings, in ``trainers/proj/image_text/siglip.py``::

    _, _, extras = model.apply({"params": params}, images, labels, train=True, rngs={"dropout": rng_model})
    logits = extras["logits"]
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx, traverse_util
from jaxtyping import Array, Float, Int, UInt8

from llip_jax.config import Config, ConfigError, resolve
from llip_jax.interop import formats
from llip_jax.interop.surgery import adapt
from llip_jax.models.big_vision import PACKAGE, import_big_vision
from llip_jax.models.dual_encoder import DualEncoder, abstract_model
from llip_jax.ops.pair_scores import FixedSide, normalize


def register(name: str = "llip_jax") -> None:
    """Makes this module ``big_vision.models.NAME``, where its trainers look for ``Model`` and ``load``.

    Raises:
        ConfigError: big_vision cannot be imported.
    """
    setattr(import_big_vision(PACKAGE), name, sys.modules[__name__])
    sys.modules[f"{PACKAGE}.{name}"] = sys.modules[__name__]


def Model(**fields: Any) -> nn.Module:
    """Our model as a linen module: ``(image, text=None, *, train=False) -> (zimg, ztxt, out)``.

    Args:
        fields: those of our section ``model``; ``vocabulary_size`` of the tokenizer in ``pp``, and its ``pad_value`` as
            ``pad``.

    Raises:
        ConfigError: fields that are not valid.
    """
    return _Model(_config(fields))


def load(
    init_params: Mapping[str, Any] | None, init_file: str, model_cfg: Mapping[str, Any], dont_load: Sequence[str] = ()
) -> dict[str, Any]:
    """Parameters from weights of any format that we read, fitted to the model as ``init.from`` does.

    Args:
        init_params: the trainer's; only ``dont_load`` needs them.
        init_file: a file or folder.
        model_cfg: ``config.model``.
        dont_load: patterns of whole paths, of parameters that stay as they are in ``init_params``.

    Raises:
        ConfigError: weights that cannot be read or do not fit.
    """
    weights = formats.read(Path(init_file))
    adapted = adapt(weights.params, resolve(weights.config), _config(model_cfg))
    kept = {
        path: value
        for path, value in traverse_util.flatten_dict(init_params or {}, sep="/").items()
        if any(re.fullmatch(pattern, path) for pattern in dont_load)
    }
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(adapted.params, sep="/") | kept, sep="/")


class _Model(nn.Module):
    """Its parameters have the paths that they have in our model (model.txt)."""

    config: Config

    @nn.compact
    def __call__(
        self, image: Array | None, text: Int[Array, "J L"] | None = None, *, train: bool = False
    ) -> tuple[Float[Array, "N d"] | None, Float[Array, "J d"] | None, dict[str, Any]]:
        """L2-normalised embeddings, and intermediate values under the names of ``two_towers``.

        ``out`` has beside them: img/side and txt/side, what pair scores need (ImageSide, TextSide); logits of all pairs
        where both are given; img/encoded, the patches, and img/tokens, the learned tokens.

        Args:
            image: uint8, or floats as ``value_range(-1,1)`` makes them of uint8.
            text: tokens, with padding behind the end token.
            train: drop patches, if ``patch_dropout`` says so, by the stream ``dropout``.
        """
        model = self._model()
        out: dict[str, Any] = {}
        zimg = ztxt = None
        if text is not None:
            texts = out["txt/side"] = model.text_side(text, _mask(text, self.config.data.tokenizer.pad))
            ztxt = _normalized(texts.embedding, "txt", out)
        if image is not None:
            drops = train and self.config.model.patch_dropout > 0
            dropout = model.draw_dropout(len(image), self.make_rng("dropout")) if drops else None
            tower = model.encode_images(_levels(image), dropout)
            out["img/encoded"], out["img/tokens"] = tower.patches, tower.mixture
            images = out["img/side"] = model.image_side(tower)
            if isinstance(images, FixedSide):
                zimg = _normalized(images.embedding, "img", out)
            if text is not None:
                out["logits"] = model.logits(images, texts)
        out["t/parameter"] = model.log_scale[...][None]
        out["t"] = jnp.exp(out["t/parameter"])
        if model.bias is not None:
            out["b"] = model.bias[...][None]
        return zimg, ztxt, out

    def _model(self) -> Any:
        if self.is_initializing():
            drawn = DualEncoder(self.config, rngs=nnx.Rngs(self.make_rng("params")))
            for name, value in nnx.to_pure_dict(nnx.state(drawn, nnx.Param)).items():
                self.put_variable("params", name, value)
        graph, _ = nnx.split(abstract_model(self.config), nnx.Param)
        return nnx.merge(graph, jax.tree.map(jnp.asarray, dict(self.variables["params"])))  # loaded ones are NumPy's


def _config(fields: Mapping[str, Any]) -> Config:
    model = ml_collections.ConfigDict(fields).to_dict()
    tokenizer = {name: model.pop(name) for name in ("vocabulary_size", "pad") if name in model}
    if model.get("logit_bias") == "prior":
        raise ConfigError("logit_bias: 'prior' needs a batch size, which is not known here; expected a number or None")
    return resolve({"model": model, "data": {"tokenizer": tokenizer}})


def _levels(image: Array) -> UInt8[Array, "N H W 3"]:
    """The 256 levels that ``value_range(-1,1)`` made floats of."""
    return image if image.dtype == jnp.uint8 else jnp.round(jnp.clip(image + 1, 0, 2) * 127.5).astype(jnp.uint8)


def _mask(tokens: Int[Array, "J L"], pad: int) -> Int[Array, "J L"]:
    """1 up to the last token that is not padding."""
    return jax.lax.cummax((tokens != pad).astype(jnp.int32), axis=1, reverse=True)


def _normalized(embedding: Float[Array, "N d"], tower: str, out: dict[str, Any]) -> Float[Array, "N d"]:
    out[f"{tower}/norm"] = jnp.linalg.norm(embedding, axis=1, keepdims=True)
    out[f"{tower}/normalized"] = normalize(embedding)
    return out[f"{tower}/normalized"]
