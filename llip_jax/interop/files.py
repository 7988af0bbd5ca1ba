"""Weight files of any library: read without running anything they hold, written whole or not at all.

Readers give C-ordered arrays of bool, integers, float32 and float64; floats of 16 and 8 bits come out as float32.
What they refuse, they refuse as a ConfigError "PATH: what is wrong".
"""

import difflib
import json
import math
import os
import pickle
import re
import uuid
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from llip_jax.config import ConfigError

Arrays = dict[str, np.ndarray]

_JSON_LIMIT = 16 * 2**20
_DEFLATE_LIMIT = 1032  # bytes that deflate can make of one
_SHARING_LIMIT = 4  # bytes of tensors for each of a torch file: some share theirs, as tied weights do
_TORCH_VERSION = (2, 10)  # the first whose weights_only=True holds: CVE-2025-32434, CVE-2026-24747
_WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name

_F8, _F8_WIDE, _BF16 = map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16))
_DTYPES = {"BF16": _BF16, "F8_E4M3": _F8, "F8_E5M2": _F8_WIDE, "BOOL": np.dtype(bool)}
_DTYPES |= {f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)}
_DTYPES |= {f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)}
_DTYPES |= {f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)}

_WRONG_DOWNLOADS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file: `git lfs pull` fetches it",
    b"<!doctype": "a web page, not the file: the download went wrong",
    b"<html": "a web page, not the file: the download went wrong",
    b"<?xml": "an XML text, not the file: the download went wrong",
}
_OTHER_FORMATS = {
    b"PK\3\4": "a zip archive, as torch.save and np.savez write them",
    b"\x80": "a Python pickle",
    b"\x93NUMPY": "a single NumPy array (.npy)",
    b"\x89HDF": "an HDF5 file",
}


def read_safetensors(path: Path) -> Arrays:
    """The tensors of a safetensors file, read one at a time.

    Raises:
        ConfigError: the file is missing, damaged or something else, or holds NaN or infinity.
    """
    size, head = _examine(path)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{":
        raise ConfigError(f"{path}: not a safetensors file{_other_format(head)}")
    if length > size - 8:
        raise ConfigError(f"{path}: half a download, or damaged: a header of {length} bytes in a file of {size}")
    arrays: Arrays = {}
    with _reading(path), path.open("rb") as stream:
        with safe_open(path, framework="np"):
            pass  # opening checks the header: shapes and dtypes fit the ranges, and those cover the file exactly
        stream.seek(8)
        header = _parse_object(stream.read(length))  # refuses a name given twice, of which safetensors takes the last
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            if (dtype := _DTYPES.get(tensor["dtype"])) is None:
                raise ConfigError(f"{path}: {name!r} has dtype {tensor['dtype']}, expected one of {', '.join(_DTYPES)}")
            begin, end = tensor["data_offsets"]
            stream.seek(8 + length + begin)
            data = _aligned(end - begin)
            if stream.readinto(data) != len(data):  # type: ignore[arg-type]
                raise ConfigError(f"{path}: changed while it was read")
            arrays[name] = _numbers(data.view(dtype).reshape(tensor["shape"]), name, path)
    check_finite(arrays, path)
    return arrays


def read_sharded_safetensors(index_path: Path) -> Arrays:
    """The tensors of the safetensors files that an index lists (``model.safetensors.index.json``).

    Raises:
        ConfigError: the index or a file is missing or broken, or the files do not hold exactly what the index lists.
    """
    listed = read_json(index_path).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ConfigError(f"{index_path}: expected a 'weight_map' from tensors to files")
    shards: dict[str, set[str]] = {}
    for name, file in listed.items():
        if file != Path(file).name or file in ("", ".."):
            raise ConfigError(f"{index_path}: {name!r} lies in {file!r}, expected a file in the folder of the index")
        shards.setdefault(file, set()).add(name)
    folder = index_path.parent
    if missing := [file for file in shards if not (folder / file).exists()]:
        raise ConfigError(f"{index_path}: {len(missing)} of its {len(shards)} files are missing: {_some(missing)}")

    arrays: Arrays = {}
    for file, names in shards.items():
        shard = read_safetensors(folder / file)
        if absent := names - shard.keys():
            raise ConfigError(
                f"{folder / file}: {index_path.name} lists tensors that it does not hold: {_some(absent)}"
            )
        if unlisted := shard.keys() - names:
            raise ConfigError(f"{folder / file}: holds tensors that {index_path.name} does not list: {_some(unlisted)}")
        arrays |= shard
    return arrays


def read_torch(path: Path) -> Arrays:
    """The tensors of a state dict of torch.save, by itself or as a checkpoint's "state_dict" or "model".

    What DistributedDataParallel and torch.compile put before every name is taken off.

    Raises:
        ConfigError: the file is missing, damaged or something else, holds code, objects, NaN or infinity; or PyTorch is
            missing or too old.
    """
    size, head = _examine(path)
    zipped = head.startswith(b"PK")
    if zipped:
        with _reading(path), zipfile.ZipFile(path) as archive:
            names = {member.filename.partition("/")[2] for member in _checked_members(archive, size, path)}
        if any(name == "constants.pkl" or name.startswith("code/") for name in names):
            raise ConfigError(
                f"{path}: a TorchScript archive, which holds code to run; expected weights alone: safetensors of the"
                " same model (Hugging Face has them), or torch.save(model.state_dict(), ...)"
            )
    elif not head.startswith(b"\x80"):  # a pickle, as torch.save wrote them before PyTorch 1.6
        raise ConfigError(f"{path}: not a file of torch.save{_other_format(head)}")

    torch = _import_torch(path)
    with _reading(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            culprit = re.search(r"GLOBAL (\S+)", str(error))
            name = culprit[1] if culprit else "unless it is damaged, or half a download"
            raise ConfigError(
                f"{path}: refused: a pickle with something other than tensors ({name}) can run code when it is read;"
                " expected torch.save(model.state_dict(), ...)"
            ) from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
        content = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise ConfigError(f"{path}: {name!r} is a {type(tensor).__name__}, expected a name and its tensor")
        if (
            total := sum(tensor.numel() * tensor.element_size() for tensor in content.values())
        ) > _SHARING_LIMIT * size:
            raise ConfigError(f"{path}: {size} bytes, but its tensors would take {total}")

        arrays: Arrays = {}
        for name, tensor in content.items():
            dtype = torch.float32 if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor.dtype
            array = tensor.detach().to(dtype, copy=True).numpy()  # a copy, as the memory may be the file's
            arrays[name] = _numbers(array, name, path)
    while prefix := next((prefix for prefix in _WRAPPERS if arrays and all(n.startswith(prefix) for n in arrays)), ""):
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    check_finite(arrays, path)
    return arrays


def read_npz(path: Path) -> Arrays:
    """The arrays of a file of np.savez; ``|V2``, which NumPy makes of bfloat16, is read as that.

    Raises:
        ConfigError: the file is missing, damaged or something else, or holds objects, NaN or infinity.
    """
    size, head = _examine(path)
    if not head.startswith(b"PK"):
        raise ConfigError(f"{path}: not an npz file{_other_format(head)}")
    arrays: Arrays = {}
    with _reading(path), zipfile.ZipFile(path) as archive:
        for member in _checked_members(archive, size, path):
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                raise ConfigError(f"{path}: not an npz file: {name!r} in it is no array (.npy)")
            with archive.open(member) as stream:
                dtype, promised = _npy_header(stream)
            if dtype.hasobject:
                raise ConfigError(f"{path}: {name!r} holds pickled objects, which can run code, expected numbers")
            if promised != member.file_size:
                raise ConfigError(f"{path}: damaged: {name!r} has {member.file_size} bytes, its header says {promised}")
            with archive.open(member) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
            arrays[name] = _numbers(array.view(_BF16) if dtype == np.dtype("V2") else array, name, path)
    check_finite(arrays, path)
    return arrays


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ConfigError: the file is missing, above 16 MiB, not JSON, no object, has a name twice, or NaN or infinity.
    """
    size, _ = _examine(path)
    if size > _JSON_LIMIT:
        raise ConfigError(f"{path}: {size} bytes, expected at most {_JSON_LIMIT} of JSON")
    with _reading(path):
        return _parse_object(path.read_bytes())


def check_finite(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Refuses weights with NaN or infinity among them, as a run that diverged leaves them.

    Raises:
        ConfigError: names the arrays.
    """
    if broken := [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]:
        raise ConfigError(f"{path}: NaN or infinity in {len(broken)} of {len(arrays)} arrays: {_some(broken)}")


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file that is either the old or the new one, never half of it."""
    # save_file takes the memory of an array as it lies, whatever its strides; ascontiguousarray makes scalars 1-d.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, dict(metadata))


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Like np.savez, but whole or not at all, never pickling, the same bytes every time, and with any names."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) that is either the old or the new one, never half of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place, safe on disk, when the block ends; gone if the block fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file in its place that only its owner may read
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # zipfile, zlib, NumPy, safetensors and torch have errors of their own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{path}: cannot be read (damaged, or half a download?): {reason}") from error


def _examine(path: Path) -> tuple[int, bytes]:
    """Size and beginning of a file, once it is clear that it is one."""
    if not path.exists():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1, cutoff=0)
        hint = f"the nearest name there is {close[0]!r}" if close else f"there is nothing in {str(path.parent)!r}"
        raise ConfigError(f"{path}: there is no such file; {hint}")
    if not path.is_file():
        raise ConfigError(f"{path}: {'a folder' if path.is_dir() else 'a device or pipe'}, expected a file")
    with _reading(path), path.open("rb") as stream:
        size, head = os.fstat(stream.fileno()).st_size, stream.read(64)
    if not size:
        raise ConfigError(f"{path}: empty")
    for beginning, meaning in _WRONG_DOWNLOADS.items():
        if head.lstrip().lower().startswith(beginning):
            raise ConfigError(f"{path}: {meaning}")
    return size, head


def _other_format(head: bytes) -> str:
    return next((f", but {name}" for start, name in _OTHER_FORMATS.items() if head.startswith(start)), "")


def _some(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names)[:4])) + (", ..." if len(names) > 4 else "")


def _aligned(size: int) -> np.ndarray:
    """Bytes that jax can take on a CPU as they lie, without a copy."""
    buffer = np.empty(size + 64, np.uint8)
    return buffer[-buffer.ctypes.data % 64 :][:size]


def _numbers(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    dtype = array.dtype.newbyteorder("=")
    if dtype not in _DTYPES.values():
        raise ConfigError(f"{path}: {name!r} has dtype {array.dtype}, expected floats of at most 64 bits or integers")
    if dtype in (_F8, _F8_WIDE, _BF16, np.float16):
        dtype = np.dtype(np.float32)
    return array.astype(dtype, order="C", copy=False)


def _parse_object(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(value := dict(pairs)) != len(pairs):
            raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} stands twice in one object")
        return value

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is not a finite number")
        return value

    value = json.loads(data.decode(), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, not a {type(value).__name__}")
    return value


def _checked_members(archive: zipfile.ZipFile, size: int, path: Path) -> list[zipfile.ZipInfo]:
    """The members of an archive: none twice, none sharing bytes with another, none larger than its bytes can make."""
    members = archive.infolist()
    if len({member.filename for member in members}) < len(members):
        raise ConfigError(f"{path}: two members of the archive have the same name")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise ConfigError(f"{path}: compressed by a method that neither torch.save nor np.savez uses")
    if sum(member.compress_size for member in members) > size or any(
        member.file_size > _DEFLATE_LIMIT * member.compress_size for member in members
    ):
        raise ConfigError(f"{path}: says that it holds more than its {size} bytes can")
    return members


def _import_torch(path: Path) -> Any:
    wanted = ".".join(map(str, _TORCH_VERSION))
    try:
        import torch
    except ImportError:
        hint = f"PyTorch (pip install 'torch>={wanted}'); safetensors of the same weights do not"
        raise ConfigError(f"{path}: reading it takes {hint}") from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < _TORCH_VERSION:
        raise ConfigError(
            f"{path}: such a file can run code in PyTorch {torch.__version__}, expected {wanted} or later"
        )
    return torch


def _npy_header(stream: Any) -> tuple[np.dtype, int]:
    """The dtype of a .npy file, and the bytes that the file should have."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = readers[np.lib.format.read_magic(stream)](stream)
    return dtype, stream.tell() + math.prod(shape) * dtype.itemsize
