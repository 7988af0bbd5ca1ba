"""Checkpoints that cannot be written: training may go on, and what was saved before stays."""

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from run_helpers import call_on_processes

from llip_jax.config import CheckpointConfig
from llip_jax.training.checkpoints import Checkpoints, SaveFailed
from llip_jax.training.progress import Progress
from llip_jax.training.state import TrainState

DISK_BYTES = 2**20


def state_of(step: int, size: int = 10_000) -> TrainState:
    """Random, so that it does not compress: ``4 * size`` bytes on disk."""
    return TrainState(jnp.int32(step), {"weight": jax.random.normal(jax.random.key(step), (size,))}, ())


def progress_of(step: int) -> Progress:
    return Progress(step, 1.0, {}, "data")


def restored_steps(directory: Path) -> list[int]:
    """Steps on disk, after reading each of them back and finding it right."""
    checkpoints = Checkpoints(directory, CheckpointConfig(), read_only=True)
    for step in checkpoints.steps:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(step))
        state, progress = checkpoints.restore(step, abstract)
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), state, state_of(step)))
        assert progress == progress_of(step)
    return checkpoints.steps


def torn(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if not path.name.isdigit()]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with DISK_BYTES."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes of a file fail in this process (EFBIG), which needs no root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_no_earlier_checkpoint(small_disk: Path) -> None:
    directory = small_disk / "checkpoints"
    checkpoints = Checkpoints(directory, CheckpointConfig(keep=2))
    for step in (1, 2):
        checkpoints.save(state_of(step), progress_of(step))
    checkpoints.wait()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(DISK_BYTES - 4096 - shutil.disk_usage(small_disk).used))
    for step in (3, 4):
        checkpoints.save(state_of(step), progress_of(step))
        with pytest.raises(SaveFailed, match=rf"checkpoint {step} cannot be written to .*: .*No space left on device"):
            checkpoints.wait()
        assert checkpoints.steps == [1, 2]
        assert torn(directory) == [], "what was begun must not take up the space that is lacking"
    assert restored_steps(directory) == [1, 2]
    filler.unlink()
    checkpoints.save(state_of(5), progress_of(5))
    checkpoints.wait()
    checkpoints.close()
    assert restored_steps(directory) == [2, 5]


def test_a_write_that_fails_is_told_by_the_next_save_which_begins_all_the_same(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, CheckpointConfig())
    checkpoints.save(state_of(1), progress_of(1))
    checkpoints.wait()
    with largest_file(200_000):
        checkpoints.save(state_of(2, 250_000), progress_of(2))
        with pytest.raises(SaveFailed, match=r"checkpoint 2 .*File too large"):
            checkpoints.save(state_of(3), progress_of(3))
        checkpoints.wait()
        checkpoints.save(state_of(4, 250_000), progress_of(4))
        with pytest.raises(SaveFailed, match=r"checkpoint 4 "):
            checkpoints.wait()
        checkpoints.wait()  # told once
        checkpoints.save(state_of(5, 250_000), progress_of(5))
        checkpoints.close()  # never raises: something else has ended the run
    assert restored_steps(directory) == [1, 3]
    again = Checkpoints(directory, CheckpointConfig())
    again.save(state_of(6), progress_of(6))
    again.close()
    assert torn(directory) == [], "the next start cleans up after a run that ended while it was saving"


def test_a_directory_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    directory, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    checkpoints = Checkpoints(directory, CheckpointConfig(keep=2))
    checkpoints.save(state_of(1), progress_of(1))
    checkpoints.wait()
    directory.rename(elsewhere)
    for step in (2, 3):
        with pytest.raises(SaveFailed, match=r"cannot be written to .*No such file or directory"):
            checkpoints.save(state_of(step), progress_of(step))
        checkpoints.wait()
        assert not directory.exists(), "what comes back would be hidden"
    elsewhere.rename(directory)
    for step in (4, 5):
        checkpoints.save(state_of(step), progress_of(step))
    checkpoints.wait()
    checkpoints.close()
    assert restored_steps(directory) == [4, 5]


def test_going_back_while_a_save_is_failing_tells_so(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    checkpoints.save(state_of(1), progress_of(1))
    with largest_file(200_000):
        checkpoints.wait()
        checkpoints.save(state_of(2, 250_000), progress_of(2))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(1))
        found = checkpoints.restore_newest(abstract)
    checkpoints.close()
    assert found is not None and int(found[0].step) == 1
    assert len(found[2]) == 1 and found[2][0].startswith("checkpoint 2 cannot be written to ")


def test_a_directory_that_vanishes_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """Whether that save fails is chance; nothing else may, and the next one is whole."""
    directory, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    checkpoints = Checkpoints(directory, CheckpointConfig())
    failed = 0
    for step in range(1, 6):
        checkpoints.save(state_of(step, 100_000), progress_of(step))
        directory.rename(elsewhere)
        try:
            checkpoints.wait()
        except SaveFailed:
            failed += 1
        shutil.rmtree(directory, ignore_errors=True)
        elsewhere.rename(directory)
    assert failed
    checkpoints.save(state_of(9), progress_of(9))
    checkpoints.wait()
    checkpoints.close()
    again = Checkpoints(directory, CheckpointConfig(), read_only=True)
    assert again.latest == 9


@contextmanager
def read_only(folder: Path, device: Path | None) -> Iterator[None]:
    if device is not None:
        subprocess.run(["mount", "-o", "remount,ro", str(device)], check=True)
    else:
        folder.chmod(0o555)
    try:
        yield
    finally:
        if device is not None:
            subprocess.run(["mount", "-o", "remount,rw", str(device)], check=True)
        else:
            folder.chmod(0o755)


def test_a_directory_that_becomes_read_only(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    # Modes do not hold root back, but a file system that is read-only does.
    device = request.getfixturevalue("small_disk") if os.geteuid() == 0 else None
    directory = (device or tmp_path) / "checkpoints"
    checkpoints = Checkpoints(directory, CheckpointConfig())
    checkpoints.save(state_of(1), progress_of(1))
    checkpoints.wait()
    with read_only(directory, device):
        with pytest.raises(SaveFailed, match=r"cannot be written to .*(Read-only file system|Permission denied)"):
            checkpoints.save(state_of(2), progress_of(2))
        assert restored_steps(directory) == [1]
    checkpoints.save(state_of(3), progress_of(3))
    checkpoints.wait()
    checkpoints.close()
    assert restored_steps(directory) == [1, 3]


def state_on_all(step: int, size: int) -> TrainState:
    mesh = Mesh(jax.devices(), "data")

    def placed(x: jax.Array) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec("data") if x.ndim else PartitionSpec())
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(placed, state_of(step, size))


FAILING = {2: 0, 4: 1}
"""Which process cannot write, by step."""


def saves_of_which_one_process_fails() -> list[Any]:
    """In each of two processes: what each of four saves says, after how long, and what is there in the end."""
    directory = Path(os.environ["SHARED_FOLDER"]) / "checkpoints"
    checkpoints = Checkpoints(directory, CheckpointConfig(), timeout_s=60)
    results: list[Any] = []
    for step in (1, 2, 3, 4):
        began = time.monotonic()
        with largest_file(200_000 if FAILING.get(step) == jax.process_index() else resource.RLIM_INFINITY):
            try:
                checkpoints.save(state_on_all(step, 1_000_000), progress_of(step))
                checkpoints.wait()
                said = ""
            except SaveFailed as error:
                said = str(error)
        results.append([said, time.monotonic() - began])
    checkpoints.close()
    return [*results, checkpoints.steps, torn(directory)]


def test_a_process_that_cannot_write_its_part_holds_up_none_and_ends_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    results = call_on_processes(saves_of_which_one_process_fails, processes=2, devices=1)
    for index, (*saves, steps, left) in enumerate(results):
        for step, (said, seconds) in enumerate(saves, 1):
            assert said.startswith(f"checkpoint {step} cannot be written to ") == (step in FAILING)
            by_another = step in FAILING and FAILING[step] != index
            assert said.endswith("another process could not write its part") == by_another
            assert seconds < 20, "far below the timeout"
        assert steps == [1, 3] and left == []
