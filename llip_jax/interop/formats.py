"""Which library wrote a set of weights, and reading and writing them by its name."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from llip_jax.config import ConfigError, nearest
from llip_jax.interop import big_vision, huggingface, open_clip, pretrained
from llip_jax.interop.weights import Weights

READERS: dict[str, Callable[[Path], Weights]] = {
    module.NAME: module.read for module in (pretrained, open_clip, huggingface, big_vision)
}
WRITERS: dict[str, Callable[[Weights, Path], None]] = {
    module.NAME: module.write for module in (pretrained, open_clip, huggingface, big_vision)
}
FILES: dict[str, Collection[str]] = {
    pretrained.NAME: pretrained.FILES,
    open_clip.NAME: open_clip.FILES,
    huggingface.NAME: huggingface.FILES,
    big_vision.NAME: (),
}
"""Names that a folder of the format may hold."""


def detect(path: Path) -> str:
    """Name of the format of a file or folder of weights.

    Raises:
        ConfigError: nothing is there, or nothing that is known.
    """
    if not path.exists():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hub = f" If it is a name on the Hugging Face hub, download it first: hf download {path} --local-dir FOLDER"
        near = nearest(path.name, names) if names else hub if str(path).count("/") == 1 else ""
        raise ConfigError(f"{path}: no such file or folder.{near}")
    if path.is_file():
        folder = path.parent
        if (folder / huggingface.CONFIG).is_file() and not (folder / open_clip.CONFIG).is_file():
            raise ConfigError(f"{path}: {huggingface.CONFIG} lies beside it; expected the folder, {folder}")
        if path.suffix == ".npz":
            return big_vision.NAME
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
            return open_clip.NAME
    elif (path / pretrained.CONFIG).is_file():
        return pretrained.NAME
    elif (path / open_clip.CONFIG).is_file():
        return open_clip.NAME
    elif (path / huggingface.CONFIG).is_file():
        return huggingface.NAME
    raise ConfigError(
        f"{path}: no weights that are known. Expected a folder with {pretrained.CONFIG} (llip_jax), {open_clip.CONFIG} "
        f"(OpenCLIP) or {huggingface.CONFIG} (Hugging Face), or a file .npz (big_vision), .safetensors, .pt (OpenCLIP)"
    )


def read(path: Path, activation: str | None = None) -> Weights:
    """Weights of any known format. ``activation`` is for a file of OpenCLIP that has no configuration beside it.

    Raises:
        ConfigError: what :func:`detect` or the format's reader refuses.
    """
    format = detect(path)
    if format == open_clip.NAME and path.is_file() and not (path.parent / open_clip.CONFIG).exists():
        weights = open_clip.read(path, activation)
    else:
        weights = READERS[format](path)
    # Ours bring their history along.
    return weights if format == pretrained.NAME else replace(weights, history=(f"Weights of {path.name} ({format}).",))


def write(weights: Weights, path: Path, format: str) -> None:
    """Writes weights for another library.

    Raises:
        ConfigError: the model has no counterpart there, or the path cannot be written.
    """
    WRITERS[format](weights, path)
