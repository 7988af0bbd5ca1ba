"""Trained weights in use: encode pictures and texts, score them with each other, tell classes apart.

Pictures stream through the model in batches: of any number of them, only results are kept. Batches are filled up to a
power of two, so that a function compiles once for each power of two and not for each number of pictures or texts.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from llip_jax.config import Config, ConfigError, EvalConfig, TokenizerConfig, resolve, to_dict
from llip_jax.data.images import Pixels, check_size, from_pillow, open_picture, resize_for_eval
from llip_jax.data.records import BadSample
from llip_jax.data.tokenizers import ClipTokenizer, Tokenizer, check_tokenizer, load_tokenizer
from llip_jax.evaluation.classes import ClassSpec
from llip_jax.evaluation.maps import caption_maps, map_bytes, uncaptioned_maps
from llip_jax.evaluation.scoring import one_late, score_blocks
from llip_jax.interop import formats, pretrained
from llip_jax.interop.weights import Weights
from llip_jax.models.dual_encoder import abstract_model, compute_dtype
from llip_jax.models.pooling import token_count
from llip_jax.models.sizes import model_shape
from llip_jax.models.vision import TowerOutput
from llip_jax.ops.pair_blocks import check_sides
from llip_jax.ops.pair_scores import ImageSide, TextSide, normalize

Picture = Image.Image | Pixels | str | Path | bytes
"""An open picture, its pixels, the path of its file, or what is in the file."""

TEMPLATES = EvalConfig().templates
_MAP_BYTES = 2**30
"""Of attention weights and their gradients, about, while maps are made."""


@dataclass(frozen=True, eq=False)
class Images:
    """What a model makes of N pictures.

    mixture: the image tokens, which a text mixes when it is compared with the picture.
    unconditioned: one vector a picture that no text has conditioned, L2-normalised. Llip does *not* score pairs with
        it; its products with ``Texts.embedding`` are good for a shortlist. (Of models with one embedding a picture it
        is that embedding.)
    """

    mixture: Float[np.ndarray, "N K Dv"]
    unconditioned: Float[np.ndarray, "N d"]


@dataclass(frozen=True, eq=False)
class Texts:
    """What a model makes of J texts.

    embedding: what a picture, mixed by the text, is compared with; L2-normalised.
    queries: what mixes the image tokens; None for models whose pictures are not mixed.
    """

    embedding: Float[np.ndarray, "J d"]
    queries: Float[np.ndarray, "J M dh"] | None


class Functions(NamedTuple):
    """A model as functions of its parameters, not yet compiled.

    image: uint8 pixels [n, H, W, 3] -> image tokens [n, K, Dv], unconditioned embeddings [n, d].
    text: tokens and mask [j, L] -> text side, its embeddings normalised.
    side: image tokens -> image side.
    """

    image: Callable[[Any, UInt8[Array, "n H W 3"]], tuple[Float[Array, "n K Dv"], Float[Array, "n d"]]]
    text: Callable[[Any, Int[Array, "j L"], Int[Array, "j L"]], TextSide]
    side: Callable[[Any, Float[Array, "n K Dv"]], ImageSide]


def functions(config: Config) -> Functions:
    """The functions of the model that ``config`` describes; what they return is float32, but for the image side."""
    graph: nnx.GraphDef[Any] = nnx.split(abstract_model(config), nnx.Param)[0]
    dtype = compute_dtype(config.model.dtype)

    def image(params: Any, pixels: UInt8[Array, "n H W 3"]) -> tuple[Float[Array, "n K Dv"], Float[Array, "n d"]]:
        model = nnx.merge(graph, params)
        output = model.encode_images(pixels)
        return output.mixture.astype(jnp.float32), normalize(model.unconditioned_embedding(output))

    def text(params: Any, tokens: Int[Array, "j L"], mask: Int[Array, "j L"]) -> TextSide:
        side = nnx.merge(graph, params).text_side(tokens, mask)
        queries = None if side.queries is None else side.queries.astype(jnp.float32)
        return TextSide(normalize(side.embedding), queries)

    def side(params: Any, mixture: Float[Array, "n K Dv"]) -> ImageSide:
        tokens = mixture.astype(dtype)
        return nnx.merge(graph, params).image_side(TowerOutput(tokens, patches=tokens[:, :0]))

    return Functions(image, text, side)


def load(path: str | Path, *, batch_size: int = 32, dtype: str = "auto") -> "Model":
    """The model of a folder of weights, of a run directory, or of another library's weights (docs/weights.md)::

        import llip_jax

        model = llip_jax.load("llip-b32")
        images = ["dog.jpg", "street.png"]
        texts = ["a dog on grass", "cars at night", "two people"]
        scores = model.score(images, texts)  # [2, 3]: cosines, every image mixed by the text
        best = [texts[j] for j in scores.argmax(axis=1)]
        probabilities = model.classify(images, ["dog", "cat", "car"])  # [2, 3], rows sum to 1
        pairs = model.encode_image(images), model.encode_text(texts)  # to keep, and score again
        again = model.score(*pairs)
        model.save_pretrained("copy-of-llip-b32")

    Args:
        path: of the folder, file or run directory.
        batch_size: pictures, or texts, that go through the model at once, at most.
        dtype: of the computation: "float32", "bfloat16", or "auto": float32 on a CPU, bfloat16 on accelerators.

    Raises:
        ConfigError: there are no weights, or they cannot be read.
    """
    return Model(_read_weights(Path(path)), batch_size=batch_size, dtype=dtype)


def _read_weights(path: Path) -> Weights:
    if (path / "checkpoints").is_dir() or "checkpoints" in (path.name, path.parent.name):
        # Seconds of imports (Orbax, TensorBoard, data formats) that only a run directory needs.
        from llip_jax.training.start import read_weights

        return read_weights(path)
    return formats.read(path)


class Model:
    """A trained model.

    Pictures are given one at a time or as an iterable, a generator too: opened by Pillow, as uint8 RGB arrays, as
    paths, or as the bytes of files. They are resized and cropped as in evaluation. A string is one text.

    Methods may be called from several threads. Texts are encoded in a thread beside the caller's, which jax's context
    managers do not reach (``jax.config.update`` does).

    Args:
        weights: of any format.
        batch_size: see :func:`load`.
        dtype: see :func:`load`.

    Raises:
        ConfigError: a batch size or dtype that is none.
    """

    def __init__(self, weights: Weights, *, batch_size: int = 32, dtype: str = "auto"):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size!r} is not valid: expected an int of at least 1")
        self.config = resolve(weights.config)
        computing = to_dict(self.config)
        # A loop over layers compiles in a fifth of the time, and without gradients it runs no slower on a CPU.
        computing["model"] |= {"dtype": dtype, "remat": "none", "scan_layers": True}
        self.computing = resolve(computing)
        """``config`` as this model computes, with the ``dtype`` that it was given."""
        self._weights = replace(weights, params=jax.device_put(weights.params))
        self._compiled = Functions(*(jax.jit(function) for function in functions(self.computing)))
        self._batch_size = batch_size
        self._pillow = threading.Lock()

    def __repr__(self) -> str:
        model = self.config.model
        return f"Model({model.pooler}, {token_count(model)} image tokens, {model.image_size} pixels)"

    @property
    def params(self) -> Any:
        """The parameters, nested, float32, on the device."""
        return self._weights.params

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by in training and in :meth:`classify`."""
        return float(np.exp(self.params["log_scale"]))

    @property
    def logit_bias(self) -> float:
        """Added to scaled cosines: sigmoid(scale * cosine + bias) is a sigmoid-trained model's chance of a match."""
        return float(self.params.get("bias", 0.0))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What texts are read with.

        Raises:
            ConfigError: the weights came without one, or it does not fit.
        """
        return _tokenizer(self.config.data.tokenizer, self.config.model.text.length)

    def encode_image(self, images: Picture | Iterable[Picture]) -> Images:
        """Image tokens and unconditioned embeddings.

        Raises:
            ConfigError: something is no picture or cannot be read (it is named), or there is none.
        """
        encoded = (((count, unconditioned), mixture) for count, mixture, unconditioned in self._encoded(images))
        rows = [(mixture[:n], np.asarray(embedding)[:n]) for (n, embedding), mixture in one_late(encoded)]
        return Images(*map(np.concatenate, zip(*rows, strict=True)))

    def encode_text(self, texts: str | Iterable[str]) -> Texts:
        """Embeddings and mixing queries.

        Raises:
            ConfigError: something is no text, there is none, or the weights came without a tokenizer.
        """
        listed = _strings(texts, "texts")
        size, length = self._rows(len(listed)), self.config.model.text.length
        blocks = []
        for start in range(0, len(listed), size):
            tokens, mask = self.tokenizer.encode(listed[start : start + size], length)
            blocks.append(self._compiled.text(self.params, _filled(tokens, size), _filled(mask, size)))
        side = jax.tree.map(lambda *x: np.concatenate(x)[: len(listed)], *jax.device_get(blocks))
        return Texts(*side)

    def score(
        self, images: Picture | Iterable[Picture] | Images, texts: str | Iterable[str] | Texts
    ) -> Float[np.ndarray, "N J"]:
        """Cosine of every picture with every text, the picture mixed by that text.

        Both sides as they are, or as :meth:`encode_image` and :meth:`encode_text` gave them.

        Raises:
            ConfigError: as those, or encoded by a model of another shape.
        """

        def side() -> TextSide:
            return self._text_side(texts if isinstance(texts, Texts) else self.encode_text(texts))

        return self._cosines(images, side)

    def classify(
        self,
        images: Picture | Iterable[Picture] | Images,
        classes: Iterable[str],
        templates: str | Sequence[str] = TEMPLATES,
    ) -> Float[np.ndarray, "N C"]:
        """Probability of every class for every picture: softmax of logit scale x cosine.

        Args:
            images: see :meth:`score`.
            classes: their names.
            templates: prompts in which ``{}`` becomes the name; a class's texts are averaged before they mix a picture.

        Raises:
            ConfigError: as :meth:`score`; names that are blank or repeated, templates without ``{}``.
        """
        if isinstance(classes, str):
            raise ConfigError(f"classes: expected several names, got {classes!r}")
        spec = ClassSpec.from_names(_strings(classes, "classes"), _strings(templates, "templates"))

        def mean(x: Float[np.ndarray, "J *d"]) -> Float[np.ndarray, "C *d"]:
            return x.reshape(len(spec.names), -1, *x.shape[1:]).mean(axis=1)

        def side() -> TextSide:
            # As evaluation.scorers.mean_text, which would compile for every number of classes and templates.
            texts = self.encode_text(text for own in spec.texts for text in own)
            return self._text_side(Texts(*jax.tree.map(mean, (texts.embedding, texts.queries))))

        logits = self.logit_scale * self._cosines(images, side)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)

    def maps(
        self, images: Picture | Iterable[Picture], texts: str | Iterable[str] | Texts | None = None
    ) -> Float[np.ndarray, "N J height width"]:
        """Where every picture agrees with every text: what each patch adds to their cosine, negative where against it.

        Without texts: where each picture's unconditioned embedding comes from, as the one map of it. The formulas are
        those of :mod:`llip_jax.evaluation.maps`, whose ``overlay`` draws a map on its picture (resized and cropped as
        in evaluation: maps are of what the model sees).

        Raises:
            ConfigError: as :meth:`score`; the vision tower is big_vision's.
        """
        columns = None
        if texts is not None:
            columns = self._text_side(texts if isinstance(texts, Texts) else self.encode_text(texts))
        count = 1 if columns is None else len(columns.embedding)
        padded = jax.tree.map(lambda x: _filled(np.asarray(x), _power_of_two(count)), columns)
        blocks = []
        for pixels in self._pixels(images):
            size = min(self._rows(len(pixels)), self._images_of_maps)
            for start in range(0, len(pixels), size):
                some = pixels[start : start + size]
                blocks.append(np.asarray(self._maps(self.params, _filled(some, size), padded))[: len(some), :count])
        if not blocks:
            raise ConfigError("images: expected at least one, got none")
        return np.concatenate(blocks)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes what :func:`load` takes, and a model card to complete; see llip_jax.interop.pretrained.write."""
        pretrained.write(self._weights, folder, overwrite=overwrite)

    def export(self, folder: str | Path) -> None:
        """Writes the model as programs that run without this package; see llip_jax.export."""
        from llip_jax.export import export  # which imports this module

        export(self, folder)

    @cached_property
    def _images_of_maps(self) -> int:
        """Pictures whose maps are made at once: a power of two."""
        fitting = _MAP_BYTES // map_bytes(abstract_model(self.computing))  # type: ignore[arg-type]
        return 1 << max(fitting.bit_length() - 1, 0)

    @cached_property
    def _maps(self) -> Callable[[Any, UInt8[Array, "n H W 3"], TextSide | None], Float[Array, "n J height width"]]:
        graph: nnx.GraphDef[Any] = nnx.split(abstract_model(self.computing), nnx.Param)[0]

        @jax.jit
        def function(params: Any, pixels: UInt8[Array, "n H W 3"], texts: TextSide | None) -> Array:
            model: Any = nnx.merge(graph, params)
            if texts is None:
                return uncaptioned_maps(model, pixels)[:, None]
            return caption_maps(model, pixels, texts)

        return function

    def _rows(self, count: int) -> int:
        """Rows of a batch for so many inputs."""
        return min(self._batch_size, _power_of_two(count))

    def _cosines(self, images: Any, texts: Callable[[], TextSide]) -> Float[np.ndarray, "N J"]:
        with ThreadPoolExecutor(1) as beside:  # The two towers compile at the same time.
            coming = beside.submit(texts)
            sides = self._image_sides(images)
            first = next(sides)
            columns = coming.result()
        try:
            check_sides(first[1], columns)
        except ValueError as error:
            raise ConfigError(f"texts: {error}") from error
        counts: deque[int] = deque()

        def on_device() -> Iterator[ImageSide]:
            for count, side in itertools.chain([first], sides):
                counts.append(count)
                yield side

        count = len(columns.embedding)
        padded = jax.tree.map(lambda x: _filled(np.asarray(x), _power_of_two(count)), columns)
        return np.concatenate([block[: counts.popleft(), :count] for block in score_blocks(on_device(), padded)])

    def _image_sides(self, images: Any) -> Iterator[tuple[int, ImageSide]]:
        """Batches of pictures as texts are compared with them, and how many rows of each are pictures."""
        for count, tokens, *_ in self._again(images) if isinstance(images, Images) else self._encoded(images):
            yield count, self._compiled.side(self.params, tokens)

    def _again(self, images: Images) -> Iterator[tuple[int, Float[Array, "n K Dv"]]]:
        """Batches of image tokens that were encoded before, and how many rows of each are pictures."""
        tokens = images.mixture
        expected = (token_count(self.config.model), model_shape(self.config.model).vision.width)
        if not len(tokens) or tokens.shape[1:] != expected:
            shape = f"[N, {expected[0]}, {expected[1]}]"
            raise ConfigError(f"images: expected image tokens {shape} of this model, got {list(tokens.shape)}")
        size = self._rows(len(tokens))
        for start in range(0, len(tokens), size):
            some = tokens[start : start + size]
            yield len(some), _filled(some, size)

    def _text_side(self, texts: Texts) -> TextSide:
        queries = texts.queries
        if (queries is not None) != (self.config.model.pooler == "mixer"):
            raise ConfigError(f"texts: queries that do not go with the pooler {self.config.model.pooler!r}")
        # In the type in which the model made them: as exact, and products of it are as in evaluation.
        dtype = compute_dtype(self.computing.model.dtype)
        return TextSide(*jax.device_put((texts.embedding, None if queries is None else queries.astype(dtype))))

    def _encoded(self, images: Any) -> Iterator[tuple[int, Float[Array, "n K Dv"], Float[Array, "n d"]]]:
        """Batches of image tokens and unconditioned embeddings, and how many rows of each are pictures."""
        size = 0
        for pixels in self._pixels(images):
            size = size or self._rows(len(pixels))
            yield len(pixels), *self._compiled.image(self.params, _filled(pixels, size))
        if not size:
            raise ConfigError("images: expected at least one, got none")

    def _pixels(self, images: Any) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """Batches of pictures as the model takes them, read and resized a batch ahead."""
        numbered = enumerate(_pictures(images))
        with ThreadPoolExecutor() as pool:

            def start() -> list[Any]:
                some = itertools.islice(numbered, self._batch_size)
                return [pool.submit(self._prepared, index, image) for index, image in some]

            batch = start()
            while batch:
                following = start()
                yield np.stack([coming.result() for coming in batch])
                batch = following

    def _prepared(self, index: int, image: Any) -> Pixels:
        try:
            return resize_for_eval(self._read(image), self.config.model.image_size)
        except Exception as error:  # Pillow raises nearly any type on what it cannot read.
            where = f" ({image})" if isinstance(image, str | Path) else ""
            problem = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ConfigError(f"images[{index}]{where}: {problem}") from error

    def _read(self, image: Any) -> Pixels:
        if isinstance(image, str | Path):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            return open_picture(image, self.config.data.limits).decode(1.0)
        if isinstance(image, Image.Image):
            with self._pillow:  # It decodes on first use, and the same one may be given twice.
                image.load()
            return from_pillow(image, self.config.data.limits)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
            check_size(image.shape[0], image.shape[1], self.config.data.limits)
            return image
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise BadSample(
            "not_an_image",
            f"expected an image of Pillow, a uint8 array [H, W, 3] (RGB), a path or the bytes of a file, got {found}",
        )


def _pictures(images: Any) -> Iterable[Any]:
    """One picture or several, as several."""
    if isinstance(images, Image.Image | str | Path | bytes) or (isinstance(images, np.ndarray) and images.ndim != 4):
        return [images]
    if not isinstance(images, Iterable):
        raise ConfigError(f"images: expected a picture or several, got {type(images).__name__}")
    return images


def _strings(texts: str | Iterable[str], what: str) -> list[str]:
    """One text or several, as several.

    Raises:
        ConfigError: something else, or none.
    """
    listed = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    for index, text in enumerate(listed):
        if not isinstance(text, str):
            raise ConfigError(f"{what}[{index}]: expected a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{what}[{index}] has half of a surrogate pair ({error})") from error
    if not listed:
        raise ConfigError(f"{what}: expected at least one, got none")
    return listed


def _tokenizer(config: TokenizerConfig, length: int) -> Tokenizer:
    if not config.name:
        raise ConfigError(
            "texts: these weights came without a tokenizer; put its tokenizer.json (or SentencePiece .model) beside "
            "them and load them again"
        )
    tokenizer: Tokenizer = (
        ClipTokenizer() if config.name == "clip" else load_tokenizer(config.name, config.clean, config.pad)
    )
    check_tokenizer(tokenizer, config, length)
    return tokenizer


def _power_of_two(count: int) -> int:
    """The least that is not below ``count``."""
    return 1 << (count - 1).bit_length()


def _filled(rows: np.ndarray, count: int) -> Array:
    """Rows and zeros behind them, ``count`` in all, on the device."""
    # Filled up on the host: a device would compile it for every number of rows.
    padding = [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return jax.device_put(np.pad(rows, padding) if len(rows) < count else rows)
