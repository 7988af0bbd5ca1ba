"""Checkpoints that are not what was written: the one before is used, or the run says why it cannot go on."""

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from run_helpers import call_on_devices, call_on_processes, temporary_folder

from llip_jax.command_line import RunFailed
from llip_jax.config import CheckpointConfig, ConfigError
from llip_jax.parallel import processes
from llip_jax.training.checkpoints import Checkpoints, Damaged
from llip_jax.training.digest import digest, state_digest
from llip_jax.training.progress import Progress
from llip_jax.training.state import TrainState

PROGRESS = Progress(32, 1.5, {"not_an_image": 3}, "data", 2, (0.1, float("nan"), 1e-30))
CHANCE = random.Random()  # fresh every time; what fails names what was done


def random_tree(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "weight": rng.standard_normal((8, 24, 16), np.float32),
        "bias": np.zeros(8, np.float32),
        "table": rng.integers(-(2**31), 2**31, (40, 3), np.int32),
        "moment": rng.standard_normal((4, 12), np.float32).astype(jnp.bfloat16),
    }


def state_of(step: int) -> TrainState:
    """Parts as of a run with averages: random, the same whenever it is asked for."""
    tree = jax.tree.map(jnp.asarray, random_tree(step))
    moments = ({"count": jnp.int32(step), "mu": tree},)
    return TrainState(jnp.int32(step), {"vision": tree, "scale": jnp.float32(step)}, moments, {"vision": tree})


def abstract_of(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def equal(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    same = all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    return same and jax.tree.structure(one) == jax.tree.structure(other)


def open_in(folder: Path, *, keep: int = 3, every: int = 1000, keep_every: int | None = None) -> Checkpoints:
    config = CheckpointConfig(keep=keep, every_steps=every, keep_every_steps=keep_every)
    return Checkpoints(folder / "checkpoints", config, sleep=lambda _: None)


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(state_of(step), PROGRESS)
    checkpoints.wait()


@cache
def run_with_two() -> Path:
    """Checkpoints 1 and 2, not to be changed."""
    folder = temporary_folder()
    checkpoints = open_in(folder)
    save(checkpoints, 1, 2)
    checkpoints.close()
    return folder


def files_of_newest() -> list[str]:
    newest = run_with_two() / "checkpoints" / "2"
    return sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())


def with_damage(folder: Path, name: str, change: Callable[[bytes], bytes | None]) -> Path:
    shutil.copytree(run_with_two(), folder)
    file = folder / "checkpoints" / "2" / name
    changed = change(file.read_bytes())
    file.unlink()
    if changed is not None:
        file.write_bytes(changed)
    return folder


def check_outcome(folder: Path, what: str) -> int:
    """Restores; the step that it got, which is as it was saved. 0: refused."""
    checkpoints = open_in(folder)
    try:
        found = checkpoints.restore_newest(abstract_of(state_of(1)))
    except ConfigError:
        return 0
    finally:
        checkpoints.close()
    assert found is not None, what
    state, progress, notes = found
    step = int(state.step)
    assert step in (1, 2), what
    assert equal(state, state_of(step)), f"{what}: a wrong state"
    assert repr(progress) == repr(PROGRESS), f"{what}: wrong progress"
    assert len(notes) == (step == 1), f"{what}: {notes}"
    assert (folder / "damaged" / "2").exists() == (step == 1), what
    return step


def flipped(data: bytes, position: int, bits: int) -> bytes:
    return data[:position] + bytes([data[position] ^ bits]) + data[position + 1 :]


def test_one_damaged_byte_in_any_file_is_harmless_or_leads_to_the_checkpoint_before(tmp_path: Path) -> None:
    steps = []
    for number, name in enumerate(files_of_newest()):
        size = (run_with_two() / "checkpoints" / "2" / name).stat().st_size
        position, bits = CHANCE.randrange(size), CHANCE.randrange(1, 256)
        what = f"{name}: byte {position} of {size} changed by {bits}"
        folder = with_damage(tmp_path / str(number), name, lambda data: flipped(data, position, bits))  # noqa: B023
        steps.append(check_outcome(folder, what))
    assert 1 in steps and 2 in steps, "files that matter and files that do not"


def test_a_file_cut_short_or_gone_is_harmless_or_leads_to_the_checkpoint_before(tmp_path: Path) -> None:
    steps = []
    for number, name in enumerate(files_of_newest()):
        size = (run_with_two() / "checkpoints" / "2" / name).stat().st_size
        length = CHANCE.choice([None, 0, CHANCE.randrange(size)])
        what = f"{name}: {length} of {size} bytes left"
        folder = with_damage(
            tmp_path / str(number),
            name,
            lambda data: None if length is None else data[:length],  # noqa: B023
        )
        steps.append(check_outcome(folder, what))
    assert 1 in steps and 2 in steps


@pytest.mark.slow
def test_any_damage_to_any_file(tmp_path: Path) -> None:
    for name in files_of_newest():
        size = (run_with_two() / "checkpoints" / "2" / name).stat().st_size
        for position in CHANCE.sample(range(size), min(size, 30)):
            bits = CHANCE.choice([1 << CHANCE.randrange(8), CHANCE.randrange(1, 256)])
            folder = with_damage(tmp_path / "run", name, lambda data: flipped(data, position, bits))  # noqa: B023
            check_outcome(folder, f"{name}: byte {position} of {size} changed by {bits}")
            shutil.rmtree(folder)
        for length in {0, 1, size - 1, *CHANCE.sample(range(size), min(size, 8))}:
            folder = with_damage(tmp_path / "run", name, lambda data: data[:length])  # noqa: B023
            check_outcome(folder, f"{name}: {length} of {size} bytes left")
            shutil.rmtree(folder)


def test_where_all_are_damaged_nothing_is_moved_and_the_run_does_not_start_anew(tmp_path: Path) -> None:
    folder = with_damage(tmp_path / "run", "progress/metadata", lambda data: data[:-1])
    (folder / "checkpoints" / "1" / "state" / "manifest.ocdbt").unlink()
    for _ in range(2):
        checkpoints = open_in(folder)
        with pytest.raises(ConfigError, match=r"no checkpoint .* can be used") as caught:
            checkpoints.restore_newest(abstract_of(state_of(1)))
        checkpoints.close()
        assert "checkpoint 2 is damaged" in str(caught.value) and "checkpoint 1 is damaged" in str(caught.value)
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1", "2"]


def test_damaged_checkpoints_are_set_aside_one_beside_the_other_and_their_steps_saved_again(tmp_path: Path) -> None:
    folder = with_damage(tmp_path / "run", "state/manifest.ocdbt", lambda data: None)
    for moved in (["2"], ["2", "2-1"], ["2", "2-1", "2-2"]):
        checkpoints = open_in(folder)
        checkpoints.check_newest(abstract_of(state_of(1)))
        found = checkpoints.restore_newest(abstract_of(state_of(1)))
        assert found is not None and int(found[0].step) == 1
        assert found[2][0].startswith("checkpoint 2 is damaged: ")
        assert found[2][0].endswith(f"; moved to {folder / 'damaged' / moved[-1]}")
        assert sorted(path.name for path in (folder / "damaged").iterdir()) == moved
        assert checkpoints.steps == [1]
        checkpoints.save(state_of(2), PROGRESS)
        checkpoints.wait()
        checkpoints.close()
        again = open_in(folder)
        assert equal(again.restore(2, abstract_of(state_of(1)))[0], state_of(2))
        again.close()
        (folder / "checkpoints" / "2" / "progress" / "metadata").write_text("{}")


def test_another_configuration_is_refused_however_many_checkpoints_there_are(tmp_path: Path) -> None:
    folder = shutil.copytree(run_with_two(), tmp_path / "run")
    checkpoints = open_in(folder)
    other = abstract_of(state_of(1))._replace(ema=None)
    for refused in (checkpoints.check_newest, checkpoints.restore_newest):
        with pytest.raises(ConfigError, match=r"only in the checkpoint: +ema/vision/bias float32\[8\]"):
            refused(other)
    checkpoints.close()
    assert not (folder / "damaged").exists()


def test_weights_for_evaluation_are_checked(tmp_path: Path) -> None:
    """Also where only a part of the state is read."""
    params = abstract_of(state_of(1)).params
    whole = open_in(shutil.copytree(run_with_two(), tmp_path / "whole"))
    expected = {"vision": state_of(2).ema["vision"], "scale": state_of(2).params["scale"]}  # type: ignore[index]
    assert equal(whole.restore_params(2, params), expected)
    whole.close()
    sizes = {name: (run_with_two() / "checkpoints" / "2" / name).stat().st_size for name in files_of_newest()}
    # So close that each of the larger arrays is hit, wherever it lies.
    places = [(name, start) for name, size in sizes.items() if size > 4000 for start in range(0, size - 2000, 2000)]
    refused = 0
    for name, start in places:
        position = start + CHANCE.randrange(2000)
        folder = with_damage(tmp_path / "run", name, lambda data: flipped(data, position, 16))  # noqa: B023
        checkpoints = open_in(folder)
        try:
            assert equal(checkpoints.restore_params(2, params), expected), (name, position)
        except Damaged:
            refused += 1
        checkpoints.close()
        shutil.rmtree(folder)
    assert refused


def write_as_before_digests(folder: Path, step: int) -> None:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    manager = ocp.CheckpointManager(folder / "checkpoints", options=options)
    progress = {name: PROGRESS._asdict()[name] for name in PROGRESS._fields[:4]}
    state = ocp.args.PyTreeSave(state_of(step)._asdict())
    manager.save(step, args=ocp.args.Composite(state=state, progress=ocp.args.JsonSave(progress)))
    manager.close()


def test_checkpoints_of_earlier_versions_restore_and_say_that_they_are_not_verified(tmp_path: Path) -> None:
    write_as_before_digests(tmp_path, 1)
    checkpoints = open_in(tmp_path)
    checkpoints.check_newest(abstract_of(state_of(1)))
    found = checkpoints.restore_newest(abstract_of(state_of(1)))
    assert found is not None
    state, progress, notes = found
    assert equal(state, state_of(1))
    assert progress == PROGRESS._replace(shift=0, losses=())
    assert notes == ["checkpoint 1 is of a version that wrote no check values: not verified"]
    with pytest.raises(ConfigError, match=r"only in the checkpoint: +ema/vision/bias float32\[8\]"):
        checkpoints.restore_newest(abstract_of(state_of(1))._replace(ema=None))
    assert equal(checkpoints.restore_params(1, abstract_of(state_of(1)).params)["vision"], state_of(1).params["vision"])
    checkpoints.close()


@pytest.mark.parametrize("field", ["check", "digests", "types", "shift", "losses"])
def test_progress_that_lacks_a_field_is_damaged_not_old(tmp_path: Path, field: str) -> None:
    def renamed(data: bytes) -> bytes:
        return data.replace(f'"{field}"'.encode(), f'"{field.title()}"'.encode())

    assert check_outcome(with_damage(tmp_path / "run", "progress/metadata", renamed), field) == 1


# Files that cannot be read for the moment.


@contextmanager
def failing_reads(error: Exception, times: int, part: str = "/2/") -> Iterator[None]:
    """The first reads of arrays under a path with ``part`` raise ``error``."""
    left, restore = [error] * times, ocp.PyTreeCheckpointHandler.restore

    def failing(handler: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        if part in str(path) and left:
            raise left.pop()
        return restore(handler, path, *arguments, **options)

    with mock.patch.object(ocp.PyTreeCheckpointHandler, "restore", failing):
        yield


READ_ERRORS = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EHOSTUNREACH, "No route to host"),
    MemoryError("out of memory"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
]


@pytest.mark.parametrize("error", READ_ERRORS, ids=str)
def test_an_error_of_the_way_to_a_checkpoint_moves_nothing(tmp_path: Path, error: Exception) -> None:
    folder = shutil.copytree(run_with_two(), tmp_path / "run")
    checkpoints = open_in(folder)
    with failing_reads(error, 2):
        found = checkpoints.restore_newest(abstract_of(state_of(1)))
    assert found is not None and int(found[0].step) == 2 and found[2] == [], "it passes by itself"
    for refused in (checkpoints.restore_newest, partial(checkpoints.rewind, every=1)):
        with (
            failing_reads(error, 100),
            pytest.raises(RunFailed, match=r"checkpoint 2 in .* cannot be read"),
        ):
            refused(abstract_of(state_of(1)))
    checkpoints.close()
    assert not (folder / "damaged").exists()
    assert checkpoints.steps == [1, 2]


def test_an_error_that_only_tensorstore_names_is_looked_into(tmp_path: Path) -> None:
    """Its errors are of one kind; reading the files says whose fault it is."""
    folder = shutil.copytree(run_with_two(), tmp_path / "run")
    checkpoints = open_in(folder)
    with failing_reads(ValueError("DATA_LOSS"), 100):
        opened = mock.patch.object(Path, "open", side_effect=OSError(errno.EIO, "Input/output error"))
        with opened, pytest.raises(RunFailed, match="cannot be read"):
            checkpoints.restore_newest(abstract_of(state_of(1)))
        assert not (folder / "damaged").exists()
        found = checkpoints.restore_newest(abstract_of(state_of(1)))
    checkpoints.close()
    assert found is not None and int(found[0].step) == 1
    assert (folder / "damaged" / "2").exists()


def test_a_checkpoint_that_is_missing_is_looked_for_again(tmp_path: Path) -> None:
    folder = shutil.copytree(run_with_two(), tmp_path / "run")
    newest, elsewhere, pauses = folder / "checkpoints" / "2", folder / "elsewhere", []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if seconds and elsewhere.exists():
            elsewhere.rename(newest)

    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(), sleep=sleep)
    newest.rename(elsewhere)
    found = checkpoints.restore_newest(abstract_of(state_of(1)))
    checkpoints.close()
    assert found is not None and int(found[0].step) == 2
    assert sum(pauses) > 0


# Going back, and what is kept for it.


def test_going_back_is_to_a_multiple_and_removes_what_came_after(tmp_path: Path) -> None:
    checkpoints = open_in(tmp_path, keep=9)
    save(checkpoints, 3, 4, 8, 9, 11)
    found = checkpoints.rewind(abstract_of(state_of(1)), 4)
    assert found is not None and equal(found[0], state_of(8)) and repr(found[1]) == repr(PROGRESS) and found[2] == []
    assert checkpoints.steps == [3, 4, 8]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4", "8"]
    save(checkpoints, 9)
    assert equal(checkpoints.restore(9, abstract_of(state_of(1)))[0], state_of(9))
    (tmp_path / "checkpoints" / "8" / "progress" / "metadata").write_text("{}")
    found = checkpoints.rewind(abstract_of(state_of(1)), 4)
    assert found is not None and int(found[0].step) == 4 and found[2][0].startswith("checkpoint 8 is damaged: ")
    assert checkpoints.steps == [3, 4]
    assert checkpoints.rewind(abstract_of(state_of(1)), 5) is None
    assert checkpoints.steps == [3, 4], "where there is nothing to go back to, nothing is removed"
    checkpoints.close()


def test_the_newest_multiple_is_kept_however_often_a_run_saves_besides(tmp_path: Path) -> None:
    checkpoints = open_in(tmp_path, keep=2, every=4, keep_every=6)
    kept = {}
    for step in (1, 4, 5, 6, 7, 8, 9, 10, 11, 13):
        save(checkpoints, step)
        kept[step] = checkpoints.steps
        assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == checkpoints.steps
    checkpoints.close()
    assert kept == {
        **{1: [1], 4: [1, 4], 5: [4, 5], 6: [4, 5, 6], 7: [4, 6, 7], 8: [6, 7, 8]},
        **{9: [6, 8, 9], 10: [6, 8, 9, 10], 11: [6, 8, 10, 11], 13: [6, 8, 11, 13]},
    }


# Digests.


def reference_digest(x: np.ndarray) -> int:
    """By the definition, in Python's integers: sum of fmix32(bits XOR position * 0x9E3779B9), modulo 2^32."""
    total = 0
    bits = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}").tolist()
    for position, value in enumerate(bits):
        h = value ^ (position * 0x9E3779B9 % 2**32)
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        total += h ^ h >> 16
    return total % 2**32


def test_the_digest_is_the_reference() -> None:
    tree = {**random_tree(CHANCE.randrange(10**9)), "scalar": np.float32(3.5), "empty": np.zeros((0, 4), np.float32)}
    digests = state_digest({"a": [tree]})
    assert digests == {f"a/0/{name}": f"{reference_digest(np.asarray(x)):08x}" for name, x in tree.items()}


def test_a_changed_element_or_two_exchanged_ones_change_the_digest() -> None:
    # Powers of two and zeros are where weights that are linear in the position would miss an exchange.
    x = np.zeros((64, 1024), np.float32)
    x[::2, ::256], x[1::2, ::256] = 1, 2
    before = int(digest(x))
    flat = x.reshape(-1)
    for _ in range(300):
        i, j = CHANCE.sample(range(0, flat.size, 256), 2)
        changed = flat.copy()
        changed[i], changed[j] = flat[j], flat[i]
        assert (int(digest(changed.reshape(x.shape))) != before) == (flat[i] != flat[j]), (i, j)
        changed = flat.copy()
        changed.view(np.uint32)[CHANCE.randrange(flat.size)] ^= 1 << CHANCE.randrange(32)
        assert int(digest(changed.reshape(x.shape))) != before


DIVISIONS: dict[str, tuple[tuple[int, int, int], PartitionSpec]] = {
    "whole": ((8, 1, 1), PartitionSpec()),
    "rows": ((8, 1, 1), PartitionSpec("data")),
    "columns": ((1, 4, 2), PartitionSpec(None, ("fsdp", "tensor"))),
    "both": ((2, 2, 2), PartitionSpec(("data", "fsdp"), "tensor")),
}


def digests_on_meshes() -> dict[str, Any]:
    """Digests of one tree by how it is divided, and what a compiled digest exchanges; runs with eight devices."""
    results: dict[str, Any] = {}
    tree = {name: random_tree(7)[name] for name in ("weight", "moment")}
    tree["moment"] = np.tile(tree["moment"], (2, 2))  # divides by eight both ways
    for name, (shape, spec) in DIVISIONS.items():
        sharding = NamedSharding(jax.make_mesh(shape, ("data", "fsdp", "tensor")), spec)
        placed = jax.device_put(tree, sharding)
        results[name] = state_digest(placed)
    text = digest.lower(placed["weight"]).compile().as_text()
    results["collectives"] = [kind for kind in ("all-gather", "all-to-all", "permute", "all-reduce(") if kind in text]
    results["expected"] = {path: f"{reference_digest(x):08x}" for path, x in tree.items()}
    return results


def test_the_digest_is_the_same_on_every_mesh_and_no_array_is_gathered() -> None:
    results = call_on_devices(digests_on_meshes, devices=8)
    assert results["collectives"] == ["all-reduce("]
    for name in DIVISIONS:
        assert results[name] == results["expected"], name


# Several processes.


def state_on_all(step: int) -> TrainState:
    mesh = Mesh(jax.devices(), "data")
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    def placed(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, rows if x.ndim and x.shape[0] % 4 == 0 else whole, lambda i: x[i])

    return jax.tree.map(placed, state_of(step))


def restore_with_damage() -> list[Any]:
    """In each of two processes: what is restored of a damaged checkpoint, and where one process cannot read."""
    folder = Path(os.environ["SHARED_FOLDER"])
    results: list[Any] = []
    checkpoints, abstract = open_in(folder), abstract_of(state_on_all(1))
    for step in (1, 2, 3):
        checkpoints.save(state_on_all(step), PROGRESS)
    checkpoints.wait()
    if jax.process_index() == 0:
        data = max((folder / "checkpoints" / "3").rglob("*"), key=lambda path: path.stat().st_size)
        data.write_bytes(flipped(data.read_bytes(), data.stat().st_size // 2, 8))
    processes.any_of(False)
    found = checkpoints.restore_newest(abstract)
    assert found is not None
    results += [int(found[0].step), found[2], checkpoints.steps, state_digest(found[0]._asdict())]

    for times in (2, 100):
        with failing_reads(OSError("no route to host"), times if jax.process_index() == 1 else 0):
            try:
                found = checkpoints.restore_newest(abstract)
                assert found is not None
                results.append(int(found[0].step))
            except RunFailed as error:
                results.append(str(error))
    found = checkpoints.rewind(abstract, 3)
    results += [found, checkpoints.steps]
    found = checkpoints.rewind(abstract, 1)
    assert found is not None
    checkpoints.save(state_on_all(4), PROGRESS)
    found = checkpoints.rewind(abstract, 2)
    assert found is not None
    results += [int(found[0].step), checkpoints.steps]
    checkpoints.close()
    return results


def test_processes_agree_on_what_is_damaged_and_restore_on_another_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    first, second = call_on_processes(restore_with_damage, processes=2, devices=2)
    for step, notes, steps, digests, *_ in (first, second):
        assert step == 2 and steps == [1, 2]
        assert len(notes) == 1 and notes[0].startswith("checkpoint 3 is damaged")
        assert digests == state_digest(state_of(2)._asdict())
    place = tmp_path / "checkpoints"
    for result, reason in ((first, "another process cannot read it"), (second, "no route to host")):
        refused = f"checkpoint 2 in {place} cannot be read and is left as it is: {reason}"
        assert result[4:] == [2, refused, None, [1, 2], 4, [1, 2, 4]]
    checkpoints = open_in(tmp_path)
    found = checkpoints.restore_newest(abstract_of(state_of(1)))
    checkpoints.close()
    assert found is not None and equal(found[0], state_of(4))


def with_stale_listings() -> list[Any]:
    """In each of two processes, of which one sees a directory as it was: steps, and what saving one again comes to."""
    folder = Path(os.environ["SHARED_FOLDER"])
    results: list[Any] = []
    checkpoints = open_in(folder)
    for step in (1, 2):
        checkpoints.save(state_on_all(step), PROGRESS)
    checkpoints.wait()
    checkpoints.close()
    listed = ocp.CheckpointManager._load_checkpoint_infos
    for stale, times in ((0, 2), (1, 2), (0, 100), (1, 100)):
        left = [0] * times

        def stale_listing(manager: Any, *arguments: Any, **options: Any) -> Any:
            found = listed(manager, *arguments, **options)
            if left and jax.process_index() == stale:  # noqa: B023
                left.pop()  # noqa: B023
                return [info for info in found if info.step != 2]
            return found

        with mock.patch.object(ocp.CheckpointManager, "_load_checkpoint_infos", stale_listing):
            try:
                checkpoints = open_in(folder)
                checkpoints.save(state_on_all(2), PROGRESS)
                checkpoints.wait()
                results.append(checkpoints.steps)
                checkpoints.close()
            except RunFailed as error:
                results.append(str(error))
    return results


@pytest.mark.slow
def test_processes_wait_until_they_see_the_same_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    for *seen, one_refusal, other_refusal in call_on_processes(with_stale_listings, processes=2, devices=2):
        assert seen == [[1, 2], [1, 2]]
        for refused in (one_refusal, other_refusal):
            assert refused.startswith("not all processes see the checkpoints in ")
