"""What the formats of models with one vector an image (CLIP, SigLIP) share."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from llip_jax.config import Config, ConfigError, nearest, resolve
from llip_jax.data.tokenizers import CLIP_VOCABULARY_SIZE, load_tokenizer
from llip_jax.interop.files import read_json, replacing
from llip_jax.interop.weights import Weights
from llip_jax.models.sizes import model_shape

TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model")
"""Names under which the libraries keep a tokenizer, the preferred one first."""

TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")

TOKENIZER_FILES = frozenset({*TOKENIZERS, *TOKENIZER_SETTINGS})
"""All that :func:`copy_tokenizer` may write."""

GEMMA_VOCABULARY_SIZE = 256_000
"""SigLIP 2's; SigLIP's own vocabularies are smaller."""

_LARGEST = 2**31
"""No number of a configuration is larger; below it, sizes times ratios stay finite."""


def require(config: Config, library: str, wanted: Mapping[str, Any]) -> None:
    """Refuses a model that another library cannot express.

    Args:
        config: the model's.
        library: its name, for the message.
        wanted: fields below ``model`` and the only value that fits.

    Raises:
        ConfigError: lists all fields that do not fit.
    """
    problems = []
    for field, value in wanted.items():
        found: Any = config.model
        for name in field.split("."):
            found = getattr(found, name)
        if found != value:
            problems.append(f"{library} has no place for model.{field}={found!r}; expected {value!r}")
    if problems:
        raise ConfigError("\n".join(problems))


def one_of(known: Mapping[str, Any], value: Any, field: str) -> Any:
    """What a name stands for.

    Raises:
        ConfigError: an unknown name, or none.
    """
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{field}={value!r} is not supported.{nearest(str(value), list(known))}")
    return known[value]


def like(value: Any, default: Any) -> bool:
    """Whether a value has a default's type and, of numbers, its sign, within reason. None is like anything."""
    if default is None or isinstance(default, bool | str):
        return default is None or isinstance(value, type(default))
    number = isinstance(value, int | float if isinstance(default, float) else int) and not isinstance(value, bool)
    return number and (0 < value <= _LARGEST or default == 0 == value)


def square(value: Any, field: str) -> int:
    """A side in pixels, given as a number or as two equal ones.

    Raises:
        ConfigError: anything else.
    """
    sides = value if isinstance(value, list) else [value]
    if not all(isinstance(side, int) and side > 0 for side in sides) or len({*sides}) != 1 or len(sides) > 2:
        raise ConfigError(f"{field}: {value!r} is not valid: expected a number of pixels, or two equal ones")
    return sides[0]


def whole_patches(image_size: int, patch: int, field: str) -> tuple[int, tuple[str, ...]]:
    """The part of a picture that a tower sees, and a note where that is not the whole: SigLIP's 384 with patches of 14.

    Raises:
        ConfigError: there is not a single patch in it.
    """
    seen = image_size // patch * patch
    if not seen:
        raise ConfigError(f"{field}: {image_size} is smaller than a patch ({patch})")
    if seen == image_size:
        return seen, ()
    return seen, (f"the source takes {image_size} pixels and leaves the last {image_size - seen} unseen; here {seen}",)


def resize_note(mode: str, filter_name: str) -> tuple[str, ...]:
    """A note where a source's preprocessing is not that of our evaluation."""
    if (mode, filter_name) == ("shortest", "bicubic"):
        return ()
    ours = "here the shorter side is resized (bicubic) and the central square taken"
    return (f"the source resizes pictures by {mode!r} ({filter_name}); {ours}",)


def tokenizer_beside(folder: Path) -> Path | None:
    """The tokenizer in a folder of weights."""
    return next((folder / name for name in TOKENIZERS if (folder / name).exists()), None)


def text_sections(folder: Path, vocabulary_size: int, clean: str | None) -> tuple[dict[str, Any], Path | None]:
    """Section ``data.tokenizer``, and the tokenizer's file where it is not CLIP's own.

    Args:
        folder: where the weights are.
        vocabulary_size: rows of the token table.
        clean: as in TokenizerConfig, for a tokenizer of a file; None: CLIP's vocabulary, if the table has its size.
    """
    section: dict[str, Any] = {"vocabulary_size": vocabulary_size}
    if clean is None and vocabulary_size == CLIP_VOCABULARY_SIZE:
        return section | {"name": "clip"}, None
    path = tokenizer_beside(folder)
    section |= {"name": "" if path is None else str(path), "clean": clean or "none"}
    return section | {"pad": padding(folder, vocabulary_size) if clean else 0}, path


def padding(folder: Path, vocabulary_size: int) -> int:
    """The token behind the texts of a SigLIP: what its tokenizer's settings name, else that of its vocabulary.

    Raises:
        ConfigError: a tokenizer.json that is none.
    """
    settings, definition = folder / TOKENIZER_SETTINGS[0], folder / TOKENIZERS[0]
    if settings.exists() and definition.exists():
        token = read_json(settings).get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        try:
            number = tokenizers.Tokenizer.from_file(str(definition)).token_to_id(str(token))
        except Exception as error:  # The library raises plain Exception.
            raise ConfigError(f"{definition}: not a Hugging Face tokenizer.json ({error})") from error
        if number is not None:
            return number
    return 0 if vocabulary_size >= GEMMA_VOCABULARY_SIZE else 1  # SigLIP pads with its end token


def copy_tokenizer(source: Path, folder: Path) -> str:
    """Puts a tokenizer, and what of Hugging Face's lies beside it, into a folder; the name that it has there.

    Raises:
        ConfigError: a file that cannot be copied.
    """
    # A lone file may have any name; the libraries know it by one.
    name = source.name if source.name in TOKENIZERS else TOKENIZERS[1 if source.suffix == ".model" else 0]
    beside = [source.parent / other for other in TOKENIZER_SETTINGS]
    if source.name == TOKENIZERS[0]:  # SiglipTokenizer takes the SentencePiece model even beside a tokenizer.json.
        beside += [source.parent / other for other in TOKENIZERS[1:]]
    for path, target in [(source, name), *((path, path.name) for path in beside if path.is_file())]:
        try:
            with replacing(folder / target) as temporary:
                shutil.copyfile(path, temporary)
        except OSError as error:
            raise ConfigError(f"data.tokenizer.name: cannot copy {path} ({error.strerror or error})") from None
    return name


def end_token(weights: Weights, config: Config) -> int:
    """The end-of-text token of the tokenizer, or the last of the vocabulary where none is known."""
    if weights.tokenizer is None:
        return config.data.tokenizer.vocabulary_size - 1
    tokens, mask = load_tokenizer(weights.tokenizer).encode([""], 2)  # room for a start and the end
    return int(tokens[0, mask[0].sum() - 1])


def config_of(weights: Weights) -> Config:
    """The typed configuration of weights."""
    return resolve(weights.config)


def checked_config(raw: Mapping[str, Any], where: Path) -> Config:
    """The typed configuration that was read off a file.

    Raises:
        ConfigError: values that are not valid, or do not go together, of this file.
    """
    try:
        config = resolve(raw)
        model_shape(config.model)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config
