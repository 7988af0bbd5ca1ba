"""Weight files against the libraries that write them; broken, wrong and hostile files; writing that is cut short."""

import argparse
import io
import json
import os
import pickle
import random
import signal
import stat
import string
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from llip_jax.config import ConfigError
from llip_jax.interop import files
from llip_jax.interop.files import (
    check_finite,
    read_json,
    read_npz,
    read_safetensors,
    read_sharded_safetensors,
    read_torch,
    replacing,
    write_npz,
    write_safetensors,
    write_text,
)

SHAPES = ((), (0,), (3, 0, 2), (7,), (5, 4), (2, 3, 4, 5), (1, 1, 300))
READERS = {"safetensors": read_safetensors, "pt": read_torch, "npz": read_npz}
WRITERS = {
    "safetensors": lambda path, arrays: write_safetensors(path, arrays, {}),
    "npz": write_npz,
    "txt": lambda path, arrays: write_text(path, repr({name: array.tolist() for name, array in arrays.items()})),
}


def refused(read: Callable[[Path], Any], path: Path, *words: str) -> str:
    """The message with which a file is refused, which names the file and holds all the words."""
    with pytest.raises(ConfigError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for word in words:
        assert word in message
    return message


def name() -> str:
    return "/".join("".join(random.choices(string.ascii_letters + "._é0", k=5)) for _ in range(random.randint(1, 3)))


def random_tensors(modern: bool = True) -> dict[str, torch.Tensor]:
    """Every dtype in every shape; those that torch.save once knew."""
    floats: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    whole: tuple[torch.dtype, ...] = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    if modern:
        floats += (torch.float8_e4m3fn, torch.float8_e5m2)
        whole += (torch.uint16, torch.uint32, torch.uint64)
    tensors = {}
    for shape in SHAPES:
        for dtype in floats:
            tensors[f"{name()} {len(tensors)}"] = torch.randn(shape, dtype=torch.float64).to(dtype)
        for dtype in whole:
            tensors[f"{name()} {len(tensors)}"] = torch.randint(0, 100, shape).to(dtype)
    return tensors


def expected(tensor: torch.Tensor) -> np.ndarray:
    short = tensor.is_floating_point() and tensor.dtype != torch.float64
    return (tensor.float() if short else tensor).numpy()


def check_same(arrays: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert arrays.keys() == wanted.keys()
    for key, array in wanted.items():
        assert arrays[key].dtype == array.dtype and arrays[key].shape == array.shape
        assert arrays[key].flags.c_contiguous and arrays[key].flags.writeable
        np.testing.assert_array_equal(arrays[key], array)


def random_arrays(size: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng()
    return {
        "scalar": np.array(rng.normal(), np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "matrix": rng.normal(size=(40 * size, 30)).astype(np.float32),
        "double": rng.normal(size=5),
        "whole/numbers": rng.integers(-9, 9, (3, 4)),
        "flags": rng.random(11) < 0.5,
        "transposed": rng.normal(size=(6, 7, 8)).astype(np.float32).transpose(2, 0, 1),
        "strided": rng.normal(size=(9, 9)).astype(np.float32)[::-2, ::3],
        "broadcast": np.broadcast_to(rng.normal(size=3).astype(np.float32), (4, 3)),
        "fortran": np.asfortranarray(rng.normal(size=(3, 5)).astype(np.float32)),
    }


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


@pytest.fixture
def trap(tmp_path):
    """A trap that works, and must not have sprung at the end of the test."""
    marker = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(marker)))
    marker.rmdir()
    yield Trap(marker)
    assert not marker.exists()


# Reading what other libraries wrote


def test_safetensors_are_read_as_torch_wrote_them(tmp_path):
    tensors = random_tensors()
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    check_same(read_safetensors(path), {key: expected(tensor) for key, tensor in tensors.items()})


@pytest.mark.parametrize("modern", [True, False])
def test_a_state_dict_is_read_as_torch_saved_it(tmp_path, modern):
    tensors = random_tensors(modern)
    for shape in SHAPES:
        tensors[f"turned {shape}"] = torch.randn(shape).permute(tuple(reversed(range(len(shape)))))
    tensors["parameter"] = torch.nn.Parameter(torch.randn(3).bfloat16())
    tensors["part"] = torch.randn(9, 9)[2:7, ::3]
    tensors["same"] = tensors["part"]
    tensors["broadcast"] = torch.randn(3, 1).expand(3, 5)
    path = tmp_path / "weights.pt"
    torch.save(OrderedDict(tensors), path, _use_new_zipfile_serialization=modern)
    check_same(read_torch(path), {key: expected(tensor.detach()) for key, tensor in tensors.items()})


def test_the_arrays_of_a_torch_file_are_their_own(tmp_path):
    path = tmp_path / "weights.pt"
    tensor = torch.randn(4, 5)
    torch.save({"a": tensor, "b": tensor, "c": tensor.T}, path)
    arrays = read_torch(path)
    path.write_bytes(b"")  # memory that is mapped from it would be lost
    arrays["a"] += 1
    np.testing.assert_array_equal(arrays["b"], tensor.numpy())
    np.testing.assert_array_equal(arrays["c"], tensor.numpy().T)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda state: state, ""),
        (lambda state: {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"lr": [0.1]}, "model": {}}, ""),
        (lambda state: {"model": state, "step": torch.tensor(3)}, ""),
        (lambda state: state, "module."),
        (lambda state: {"state_dict": state}, "_orig_mod."),
        (lambda state: state, "module._orig_mod."),
        (lambda state: state, "_orig_mod.module."),
    ],
)
def test_checkpoints_give_their_models_weights(tmp_path, wrap, prefix):
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    path = tmp_path / "epoch_3.pt"
    torch.save(wrap({prefix + key: tensor for key, tensor in state.items()}), path)
    check_same(read_torch(path), {key: tensor.numpy() for key, tensor in state.items()})


def test_a_wrappers_name_that_only_some_have_stays(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, path)
    assert read_torch(path).keys() == {"module.a", "b"}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_as_numpy_wrote_it(tmp_path, save):
    arrays = random_arrays() | {"half": np.float16([1, 2]), "big endian": np.arange(5, dtype=">f4")}
    short = np.random.default_rng().normal(size=(3, 4)).astype(ml_dtypes.bfloat16)
    path = tmp_path / "arrays.npz"
    save(path, **arrays, short=short, turned=short.T, short_scalar=short[0, 0])
    with np.load(path) as saved:
        assert saved["short"].dtype == np.dtype("V2")
    wanted = arrays | {"half": np.float32([1, 2]), "big endian": np.arange(5, dtype=np.float32)}
    wanted |= {"short": short.astype(np.float32), "turned": short.T.astype(np.float32)}
    check_same(read_npz(path), wanted | {"short_scalar": np.array(short[0, 0], np.float32)})


def test_shards_are_read_as_hugging_face_split_them(tmp_path):
    tensors = {key: tensor for key, tensor in random_tensors().items() if tensor.numel()}
    huggingface_hub.save_torch_state_dict(tensors, tmp_path, max_shard_size=3000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    arrays = read_sharded_safetensors(tmp_path / "model.safetensors.index.json")
    check_same(arrays, {key: expected(tensor) for key, tensor in tensors.items()})


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_file_is_read_with_little_more_memory_than_its_arrays_take(tmp_path, suffix):
    arrays = {str(n): np.random.default_rng().normal(size=500_000).astype(np.float32) for n in range(8)}
    WRITERS[suffix](tmp_path / f"big.{suffix}", arrays)
    tracemalloc.start()
    READERS[suffix](tmp_path / f"big.{suffix}")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * sum(array.nbytes for array in arrays.values())


# Writing


def test_what_is_written_is_what_the_libraries_read(tmp_path):
    arrays = random_arrays()
    write_safetensors(tmp_path / "a.safetensors", arrays, {"format": "pt", "über": "ja"})
    write_npz(tmp_path / "a.npz", arrays | {"file": np.ones(2), "allow_pickle": np.ones(2)})  # arguments of np.savez
    write_text(tmp_path / "a.txt", "Grüße\r\n")

    wanted = {key: np.ascontiguousarray(array).reshape(array.shape) for key, array in arrays.items()}
    check_same(safetensors.numpy.load_file(tmp_path / "a.safetensors"), wanted)
    check_same(read_safetensors(tmp_path / "a.safetensors"), wanted)
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt", "über": "ja"}
    with np.load(tmp_path / "a.npz") as saved:
        assert set(saved) == {*arrays, "file", "allow_pickle"}
        for key, array in arrays.items():
            np.testing.assert_array_equal(saved[key], array, strict=True)
    assert (tmp_path / "a.txt").read_bytes() == "Grüße\r\n".encode()


def test_bfloat16_survives_both_formats(tmp_path):
    short = np.random.default_rng().normal(size=(4, 6)).astype(ml_dtypes.bfloat16)
    for suffix in ("safetensors", "npz"):
        WRITERS[suffix](tmp_path / f"a.{suffix}", {"a": short, "turned": short.T})
        arrays = READERS[suffix](tmp_path / f"a.{suffix}")
        check_same(arrays, {"a": short.astype(np.float32), "turned": np.ascontiguousarray(short.T, np.float32)})
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["a"].dtype == torch.bfloat16


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_can_be_read_by_whom_the_umask_lets(tmp_path, suffix):
    path, plain = tmp_path / f"a.{suffix}", tmp_path / "plain"
    WRITERS[suffix](path, random_arrays())
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_same_arrays_give_the_same_bytes(tmp_path, suffix):
    arrays = random_arrays()
    for number in range(2):
        WRITERS[suffix](tmp_path / f"{number}.{suffix}", arrays)
    assert (tmp_path / f"0.{suffix}").read_bytes() == (tmp_path / f"1.{suffix}").read_bytes()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    objects = random_arrays() | {"z": np.array([object()])}
    before = {}
    for suffix, write in WRITERS.items():
        write(tmp_path / f"a.{suffix}", random_arrays())
        before[f"a.{suffix}"] = (tmp_path / f"a.{suffix}").read_bytes()

    with pytest.raises(safetensors.SafetensorError):
        write_safetensors(tmp_path / "a.safetensors", objects, {})
    with pytest.raises(ValueError, match="Object arrays"):  # after ten arrays are in the file
        write_npz(tmp_path / "a.npz", objects)
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "half of it" * 10_000 + "\ud800")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt"):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    for suffix, write in WRITERS.items():
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / f"a.{suffix}", random_arrays())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


WRITE = f"""
import resource, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from llip_jax.interop.files import write_npz, write_safetensors, write_text
folder, suffix, number, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def write(number):
    arrays = {{str(n): np.full((size,), number, np.float32) for n in range(4)}}
    if suffix == "npz": write_npz(folder / "a.npz", arrays)
    elif suffix == "txt": write_text(folder / "a.txt", str(number) * 16 * size)
    else: write_safetensors(folder / "a.safetensors", arrays, {{}})
"""


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, suffix):
    WRITERS[suffix](tmp_path / f"a.{suffix}", random_arrays())
    before = (tmp_path / f"a.{suffix}").read_bytes()
    limited = WRITE + "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\nwrite(number)"
    command = [sys.executable, "-c", limited, str(tmp_path), suffix, "1", "300000"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "File too large" in run.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {f"a.{suffix}": before}


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_process_killed_while_it_writes_leaves_a_whole_file(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    forever = WRITE + "while True:\n    number += 1\n    write(number)"
    process = subprocess.Popen([sys.executable, "-c", forever, str(tmp_path), suffix, "0", "1000000"])
    try:
        deadline = time.monotonic() + 60
        while True:  # until it is caught in the middle of a file
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(random.uniform(0, 0.02))
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            if path.exists() and any(file != path and file.stat().st_size for file in tmp_path.iterdir()):
                break
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
    values = {float(value) for array in READERS[suffix](path).values() for value in np.unique(array)}
    assert len(values) == 1 and values.pop() >= 1


# Files that are no weights


@pytest.mark.parametrize("read", [*READERS.values(), read_json, read_sharded_safetensors])
def test_what_is_no_file_of_weights_is_named(tmp_path, read):
    (tmp_path / "model.bin").write_bytes(b"")
    refused(read, tmp_path / "model.bin", "empty")
    refused(read, tmp_path / "modle.bin", "no such file", "'model.bin'")
    refused(read, tmp_path / "nowhere" / "model.bin", "no such file", "nothing in")
    refused(read, tmp_path, "a folder")
    os.mkfifo(tmp_path / "pipe")
    refused(read, tmp_path / "pipe", "device or pipe")

    path = tmp_path / "download"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    refused(read, path, "a Git LFS pointer", "git lfs pull")
    for page in (
        "<!DOCTYPE html>\n<html>",
        "\n <html lang=en>",
        "<?xml version='1.0'?><Error><Code>AccessDenied</Code>",
    ):
        path.write_text(page)
        refused(read, path, "the download went wrong")
    path.write_bytes(random.randbytes(1000))
    refused(read, path)


def test_files_of_another_format_are_named(tmp_path):
    np.savez(tmp_path / "zip", a=np.ones(2))
    (tmp_path / "zip.npz").rename(tmp_path / "zip")
    np.save(tmp_path / "single", np.ones(2))
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": np.ones(2)}))
    (tmp_path / "hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "good.safetensors")
    refused(read_safetensors, tmp_path / "zip", "not a safetensors file", "a zip archive")
    for read in (read_safetensors, read_npz):
        refused(read, tmp_path / "pickle", "not a", "a Python pickle")
    for read in READERS.values():
        refused(read, tmp_path / "hdf5", "not a", "HDF5")
        refused(read, tmp_path / "single.npy", "not a", ".npy")
    refused(read_torch, tmp_path / "zip", "cannot be read")
    refused(read_torch, tmp_path / "good.safetensors", "not a file of torch.save")
    refused(read_npz, tmp_path / "good.safetensors", "not an npz file")
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt")
    refused(read_npz, tmp_path / "weights.pt", "not an npz file", "data.pkl")


def whole_files(folder: Path) -> dict[str, Path]:
    """One file a reader accepts, by suffix; "legacy" is what torch.save wrote once."""
    arrays = {key: np.ascontiguousarray(array).reshape(array.shape) for key, array in random_arrays().items()}
    tensors = {key: torch.tensor(array) for key, array in arrays.items()}
    safetensors.numpy.save_file(arrays, folder / "a.safetensors")
    torch.save(tensors, folder / "a.pt")
    torch.save(tensors, folder / "a.legacy", _use_new_zipfile_serialization=False)
    np.savez_compressed(folder / "a.npz", **arrays)
    return {path.suffix[1:]: path for path in folder.glob("a.*")}


def test_half_a_download_is_refused(tmp_path):
    for suffix, path in whole_files(tmp_path).items():
        read = READERS.get(suffix, read_torch)
        read(path)
        whole = path.read_bytes()
        for length in (1, 7, 8, 9, 30, len(whole) // 2, len(whole) - 1, *random.sample(range(1, len(whole)), 20)):
            path.write_bytes(whole[:length])
            message = refused(read, path)
            if length >= 30 and suffix != "legacy":  # which may end within a name, then one that torch does not know
                assert "half a download" in message


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_never_shows_as_anything_but_a_refusal(tmp_path):
    for suffix, path in whole_files(tmp_path).items():
        whole = path.read_bytes()
        ends = [*range(min(400, len(whole))), *range(max(0, len(whole) - 400), len(whole))]  # where the headers are
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(random.randint(1, 3)):
                damaged[random.choice([random.choice(ends), random.randrange(len(whole))])] = random.randrange(256)
            path.write_bytes(damaged)
            with suppress(ConfigError):
                READERS.get(suffix, read_torch)(path)


# Hostile and lying files


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_pickle_is_run(tmp_path, trap):
    path = tmp_path / "weights"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"a": trap}, protocol))
        for read in (*READERS.values(), read_json, read_sharded_safetensors):
            refused(read, path)
    for modern in (True, False):
        for content in ({"a": trap}, trap, {"a": torch.zeros(2), "b": trap}, {"state_dict": {"a": trap}}):
            torch.save(content, path, _use_new_zipfile_serialization=modern)
            refused(read_torch, path, "something other than tensors", "mkdir")
    for trapped in (np.array([trap, 1.0], object), np.array(trap, object)):
        np.savez(tmp_path / "objects.npz", good=np.ones(2), bad=trapped)
        refused(read_npz, tmp_path / "objects.npz", "'bad' holds pickled objects")
    fields = np.array([(1.0, trap)], [("number", "f4"), ("object", "O")])
    np.savez(tmp_path / "objects.npz", bad=fields)
    refused(read_npz, tmp_path / "objects.npz", "'bad' holds pickled objects")


def test_a_training_checkpoint_with_objects_is_refused_by_their_name(tmp_path):
    path = tmp_path / "epoch_3.pt"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "args": argparse.Namespace(lr=1)}, path)
    message = refused(read_torch, path, "argparse.Namespace", "torch.save(model.state_dict(), ...)")
    assert "weights_only" not in message  # torch's own says how to run what the file holds


def test_torchscript_is_refused_with_a_way_out(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    refused(read_torch, path, "TorchScript", "holds code", "safetensors")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    refused(read_torch, path, "TorchScript", "holds code", "safetensors")


def header(*shape: int, at: tuple[int, int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


A_TWICE = f'{{"a": {json.dumps(header(1, at=(0, 4)))}, "a": {json.dumps(header(2, at=(0, 8)))}}}'


@pytest.mark.parametrize(
    ("text", "data", "word"),
    [
        ({"a": header(4, at=(0, 16))}, 8, "half a download"),
        ({"a": header(2, at=(0, 8))}, 12, "cannot be read"),
        ({"a": header(2, at=(0, 8)), "b": header(2, at=(4, 12))}, 12, "cannot be read"),
        ({"a": header(2, at=(0, 8)), "b": header(2, at=(12, 20))}, 20, "cannot be read"),
        ({"a": header(2, at=(0, 8)), "b": header(2, at=(0, 8))}, 8, "cannot be read"),
        ({"a": header(3, at=(0, 8))}, 8, "cannot be read"),
        ({"a": header(2, at=(8, 0))}, 8, "cannot be read"),
        ({"a": header(-2, at=(0, 8))}, 8, "cannot be read"),
        ({"a": header(2**62, 2**62, at=(0, 8))}, 8, "cannot be read"),
        ({"a": header(1, at=(0, 8), dtype="F128")}, 8, "cannot be read"),
        ({"a": header(1, at=(0, 8), dtype="C64")}, 8, "'a' has dtype C64"),
        ({"a": header(4, at=(0, 2), dtype="F4")}, 2, "'a' has dtype F4"),
        ({"a": 3}, 0, "cannot be read"),
        ({"__metadata__": {"a": {}}}, 0, "cannot be read"),
        ('{"a": ', 0, "cannot be read"),
        ('{"a":' * 100_000, 0, "cannot be read"),
        (A_TWICE, 8, "'a' stands twice"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, text, data, word):
    path = tmp_path / "a.safetensors"
    encoded = (text if isinstance(text, str) else json.dumps(text)).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(data))
    refused(read_safetensors, path, word)
    for length in (len(encoded) + data + 1, 100_000_001, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + encoded + bytes(data))
        refused(read_safetensors, path, "half a download, or damaged", str(length))
    path.write_bytes(struct.pack("<Q", 100_000_001) + encoded)
    os.truncate(path, 200_000_000)
    refused(read_safetensors, path, "cannot be read")


def npy(array: np.ndarray, **lies: Any) -> bytes:
    """A .npy file, with other values in its header."""
    stream = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape} | lies
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue() + array.tobytes()


def write_zip(path: Path, method: int = zipfile.ZIP_STORED, **members: bytes) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(path, "w", method)
    for member, data in members.items():
        archive.writestr(member.replace("_npy", ".npy"), data)
    return archive


def test_an_npz_that_lies_about_its_sizes_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    ones = np.ones(4)
    for shape in ((10**12,), (3,), (5,), (-4,), (-2, -2), (2**40, 2**40), ()):
        write_zip(path, a_npy=npy(ones, shape=shape)).close()
        refused(read_npz, path)
    for descr in ("<f4", "|V1000000000", "O", "|S8", "<c16", [("x", "<f8")], "<M8[s]", "nonsense"):
        write_zip(path, a_npy=npy(ones, descr=descr)).close()
        refused(read_npz, path)
    with write_zip(path, a_npy=npy(ones, shape=(10**12,))) as archive:
        archive.filelist[0].file_size = len(npy(ones, shape=(10**12,))) - 32 + 8 * 10**12
    refused(read_npz, path, "more than its")
    with write_zip(path, zipfile.ZIP_DEFLATED, a_npy=npy(np.zeros(10**6))) as archive:
        for number in range(100):  # a hundred members that share their bytes
            copy = archive.filelist[0]
            shared = zipfile.ZipInfo(f"{number}.npy")
            for field in ("compress_type", "CRC", "compress_size", "file_size", "header_offset"):
                setattr(shared, field, getattr(copy, field))
            archive.filelist.append(shared)
    refused(read_npz, path, "more than its")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_npz_of_other_members_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    write_zip(path, a_npy=npy(np.ones(4)), readme=b"text").close()
    refused(read_npz, path, "'readme' in it is no array")
    write_zip(path, a_npy=b"no array").close()
    refused(read_npz, path, "cannot be read")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write_zip(path, method, a_npy=npy(np.ones(4))).close()
        refused(read_npz, path, "compressed by a method")
    with write_zip(path, a_npy=npy(np.ones(4))) as archive:
        archive.writestr("a.npy", npy(np.zeros(4)))
    refused(read_npz, path, "same name")
    with write_zip(path, a_npy=npy(np.ones(4))) as archive:
        archive.filelist[0].flag_bits |= 1  # encrypted
    refused(read_npz, path, "cannot be read")


def test_an_npz_with_a_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    write_npz(path, {"a": np.ones(1000)})
    damaged = bytearray(path.read_bytes())
    damaged[4000] ^= 1
    path.write_bytes(damaged)
    refused(read_npz, path, "CRC")


@pytest.mark.parametrize("modern", [True, False])
def test_a_torch_file_of_other_than_a_state_dict_is_refused(tmp_path, modern):
    path = tmp_path / "weights.pt"
    for content, word in (
        (torch.zeros(2), "expected a dict of tensors"),
        ([torch.zeros(2)], "expected a dict of tensors"),
        ({"a": torch.zeros(2), "b": 3.5}, "'b' is a float"),
        ({3: torch.zeros(2)}, "3 is a Tensor"),
        ({"a": {"b": torch.zeros(2)}}, "'a' is a dict"),
        ({"a": torch.eye(2).to_sparse()}, "Sparse"),
        ({"a": torch.zeros(2, device="meta")}, "meta"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "'a' has dtype complex64"),
        ({"a": torch.zeros(1).expand(10**12)}, "would take"),
        (dict.fromkeys(map(str, range(100)), torch.zeros(10_000)), "would take"),
    ):
        torch.save(content, path, _use_new_zipfile_serialization=modern)
        refused(read_torch, path, word)


def test_without_torch_the_user_learns_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(2)}, path)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    refused(read_torch, path, "PyTorch 2.9.1", "2.10 or later")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(read_torch, path, "pip install 'torch>=2.10'", "safetensors")


def test_the_module_is_imported_without_torch():
    code = "import sys, llip_jax.interop.files; assert not {'torch', 'jax', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Indices of shards, JSON, and numbers


@pytest.fixture
def sharded(tmp_path):
    """Writes an index of two files, x and y, after a change to what it says."""
    for shard, tensors in (("x", {"a": np.ones(2), "b": np.ones(3)}), ("y", {"c": np.ones(4)})):
        safetensors.numpy.save_file(tensors, tmp_path / f"{shard}.safetensors")

    def write(**changes: Any) -> Path:
        weight_map = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"} | changes
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        return path

    return write


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, sharded):
    assert read_sharded_safetensors(sharded()).keys() == {"a", "b", "c"}
    outside = tmp_path.parent / f"{tmp_path.name}.safetensors"
    safetensors.numpy.save_file({"c": np.ones(4)}, outside)
    for file in (f"../{outside.name}", str(outside), f"./../{outside.name}", "..", ".", "", "/", "y.safetensors/"):
        refused(read_sharded_safetensors, sharded(c=file))
    outside.unlink()


def test_shards_that_do_not_hold_what_the_index_lists_are_refused(tmp_path, sharded):
    def index_refused(*words: str, file: str = "model.safetensors.index.json", **changes: Any) -> None:
        index = sharded(**changes)
        refused(lambda path: read_sharded_safetensors(index), tmp_path / file, *words)

    index_refused("does not hold: 'd'", file="y.safetensors", d="y.safetensors")
    index_refused("does not list: 'b'", file="x.safetensors", b="y.safetensors")
    index_refused("1 of its 3 files are missing: 'z.safetensors'", d="z.safetensors")
    index_refused("weight_map", a=3)
    (tmp_path / "y.safetensors").write_bytes((tmp_path / "y.safetensors").read_bytes()[:-1])
    index_refused("half a download", file="y.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    refused(read_sharded_safetensors, tmp_path / "model.safetensors.index.json", "weight_map")


def test_json_is_read_strictly(tmp_path):
    path = tmp_path / "config.json"
    value = {"name": "Grüße", "sizes": [1, 2.5e-3, None, True], "nested": {"name": ""}}
    for ascii_only in (True, False):
        path.write_text(json.dumps(value, ensure_ascii=ascii_only), encoding="utf-8")
        assert read_json(path) == value
    for text, word in (
        ("[1]", "expected a JSON object"),
        ('{"a": 1, "b": {"x": 1, "x": 1}}', "'x' stands twice"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": [-Infinity]}', "-Infinity is not a finite number"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": ' + "9" * 10_000 + "}", "cannot be read"),
        ('{"a": 1', "half a download"),
        ('{"a": 1} x', "cannot be read"),
        ('{"a":' * 100_000, "recursion"),
    ):
        path.write_text(text)
        refused(read_json, path, word)
    path.write_bytes(b'{"a": "\xff"}')
    refused(read_json, path, "utf-8")
    path.write_bytes(b"{" + b" " * (16 * 2**20) + b"}")
    refused(read_json, path, "at most 16777216")


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(tmp_path, broken, dtype):
    tensors = {"good": torch.ones(3), "bad": torch.ones(3, 4), "whole": torch.ones(2, dtype=torch.int64)}
    tensors["bad"][1, 2] = broken
    tensors["bad"] = tensors["bad"].to(dtype)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pt")
    write_npz(tmp_path / "a.npz", safetensors.numpy.load_file(tmp_path / "a.safetensors"))
    for suffix, read in READERS.items():
        refused(read, tmp_path / f"a.{suffix}", "NaN or infinity in 1 of 3 arrays: 'bad'")


def test_the_first_of_many_broken_arrays_are_named():
    path = Path("model.npz")
    check_finite({"a": np.ones(2), "b": np.array(3), "c": np.zeros(0)}, path)
    broken = {f"{n}": np.array(np.nan) for n in range(9)}
    refused(lambda path: check_finite(broken, path), path, "9 of 9", "'0', '1', '2', '3', ...")


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, random_arrays(), {})

    def denied(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files.Path, "open", denied)  # the tests may run as root, who may read anything
    refused(read_safetensors, path, "Permission denied")
