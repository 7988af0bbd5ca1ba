"""The same training on every mesh: eight simulated devices in a process of their own, and the rules one by one."""

import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec
from run_helpers import call_on_devices, run, temporary_folder, tiny_config, words

from llip_jax.config import CheckpointConfig, ConfigError, MeshConfig
from llip_jax.data.pipeline import build_tokenizer, train_batches
from llip_jax.data.sources import build_source
from llip_jax.parallel.mesh import batch_shards, make_mesh
from llip_jax.parallel.sharding import AT_REST, constrain, partition_spec
from llip_jax.training import loop
from llip_jax.training.checkpoints import Checkpoints
from llip_jax.training.optimizer import make_optimizer
from llip_jax.training.progress import Progress
from llip_jax.training.state import init_state, state_spec
from llip_jax.training.step import DEVICE_COLUMNS, make_train_step, steering, step_inputs

STEPS = 20
MESHES = {
    "one": MeshConfig(data=1, fsdp=1, tensor=1),
    "data8": MeshConfig(data=8, fsdp=1, tensor=1),
    "fsdp8": MeshConfig(data=1, fsdp=-1, tensor=1),
    "data2_fsdp2_tensor2": MeshConfig(data=-1, fsdp=2, tensor=2),
}
FIRST_LOSS_TOLERANCE = 1e-6
LOSS_TOLERANCE = 5e-6
"""Relative, over 20 steps; measured 4e-7."""
STATE_TOLERANCE = 1e-3
"""Of each array's change in training; measured 2e-4: Adam divides by tiny second moments at first."""
MOMENT_TOLERANCE = 5e-5
"""Of each array; measured 3e-6."""


def train_on_meshes() -> dict[str, Any]:
    """What the tests below compare, by mesh; runs with eight devices."""
    config = tiny_config(train={"steps": STEPS, "batch_size": 16})
    source = build_source(config.data, "train", config.model.image_size)
    folder = temporary_folder()
    tokenizer = build_tokenizer(config.data.tokenizer, source, folder / "tokenizer.json", config.model.text.length)
    batches = list(
        train_batches(
            source,
            tokenizer,
            config.data,
            image_size=config.model.image_size,
            text_length=config.model.text.length,
            seed=0,
            batch_size=config.train.batch_size,
            start_step=0,
            stop_step=STEPS,
        )
    )
    optimizer = make_optimizer(config.optimizer, STEPS)
    results: dict[str, Any] = {}
    first, last = None, None
    for name, sizes in MESHES.items():
        mesh = make_mesh(sizes, jax.devices()[: 1 if name == "one" else 8])
        with jax.set_mesh(mesh):
            spec, inputs = state_spec(config, optimizer, mesh), step_inputs(config, mesh)
            step = loop.compile_step(make_train_step(config, spec, optimizer), config, spec, mesh)
            # Born on the first and the most divided mesh; moved to the others, which saves compiling.
            born = first is None or name == "data2_fsdp2_tensor2"
            state = init_state(config, optimizer, spec) if born else jax.device_put(first, spec.shardings)
            # A copy: where the host looks at the state itself, it cannot be donated.
            start = jax.device_get(jax.tree.map(jnp.copy, state))
            losses, donated = [], True
            for batch in batches:
                before = state
                columns = {name: batch[name] for name in DEVICE_COLUMNS} | steering(config.train.batch_size)
                columns = {name: jax.device_put(x, inputs[name].sharding) for name, x in columns.items()}
                state, metrics = step(state, columns)
                losses.append(float(metrics["loss"]))
                donated &= all(x.is_deleted() for x in jax.tree.leaves(before))
            if first is None:
                first, last = start, jax.device_get(state)
                checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig())
                checkpoints.save(state, Progress(1, 2.0, {"unreadable": 3}, "data"))
                checkpoints.wait()
            saved = Checkpoints(folder / "checkpoints", CheckpointConfig(), read_only=True)
            restored, progress = saved.restore(STEPS, spec.abstract)
            params = saved.restore_params(STEPS, spec.abstract.params)
        results[name] = {
            "mesh": dict(mesh.shape),
            "losses": losses,
            "donated": donated,
            "start_difference": _difference(start.params, first.params, first.params),
            "state_difference": _difference(state.params, last.params, _minus(last.params, first.params)),
            "moment_difference": _difference(_large(state.opt_state), _large(last.opt_state), _large(last.opt_state)),
            "share_on_a_device": {kind: _share(tree) for kind, tree in state._asdict().items() if kind != "step"},
            "large_arrays": _shares_of_large_arrays(state),
            "as_specified": _placed_alike(state, spec.abstract),
            "restored_as_specified": _placed_alike((restored, params), (spec.abstract, spec.abstract.params)),
            "restored_equal": _equal(restored, last) and _equal(params, last.params),
            "progress": progress,
            "gathers": [
                [int(n) for n in shape.split(",")]
                for shape in re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", step.as_text())
            ],
        }
    return results


def _placed_alike(tree: Any, abstract: Any) -> bool:
    def alike(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> bool:
        return x.sharding.is_equivalent_to(wanted.sharding, x.ndim) and x.dtype == wanted.dtype

    return all(jax.tree.leaves(jax.tree.map(alike, tree, abstract)))


def _equal(tree: Any, other: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, tree, other)))


def _minus(tree: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: x - y, tree, other)


def _large(tree: Any) -> list[np.ndarray]:
    """Arrays of more than a number, on the host."""
    return [np.asarray(x) for x in jax.tree.leaves(tree) if x.ndim]


def _difference(tree: Any, other: Any, scale: Any) -> float:
    """The largest, over arrays, of |x - y| / |scale|."""

    def relative(x: Any, y: Any, s: Any) -> float:
        return float(np.linalg.norm(np.asarray(x) - y) / max(np.linalg.norm(s), 1e-12))

    return max(jax.tree.leaves(jax.tree.map(relative, tree, other, scale)))


def _bytes_on_a_device(x: jax.Array) -> int:
    device = jax.devices()[0]
    return sum(shard.data.nbytes for shard in x.addressable_shards if shard.device == device)


def _share(tree: Any) -> float:
    """Bytes that the first device really holds, as a share of all."""
    leaves = jax.tree.leaves(tree)
    return sum(map(_bytes_on_a_device, leaves)) / sum(x.nbytes for x in leaves)


def _shares_of_large_arrays(state: Any) -> dict[str, float]:
    """Of the weight matrices of the blocks and the token table, with their moments."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _bytes_on_a_device(x) / x.nbytes
        for path, x in leaves
        if getattr(path[-1], "key", "") in ("qkv", "out", "up", "down", "embedding")
    }


@cache
def results() -> dict[str, Any]:
    return call_on_devices(train_on_meshes, devices=8)


DIVIDED = [name for name in MESHES if name != "one"]


@pytest.mark.slow
def test_losses_fall_in_the_first_place() -> None:
    losses = results()["one"]["losses"]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("mesh", DIVIDED)
def test_losses_do_not_depend_on_the_mesh(mesh: str) -> None:
    losses, expected = results()[mesh]["losses"], results()["one"]["losses"]
    assert losses[0] == pytest.approx(expected[0], rel=FIRST_LOSS_TOLERANCE)
    assert losses == pytest.approx(expected, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("mesh", DIVIDED)
def test_state_does_not_depend_on_the_mesh(mesh: str) -> None:
    assert results()[mesh]["start_difference"] < 1e-6
    assert results()[mesh]["state_difference"] < STATE_TOLERANCE
    assert results()[mesh]["moment_difference"] < MOMENT_TOLERANCE


@pytest.mark.parametrize(("mesh", "share"), [("data8", 1), ("fsdp8", 1 / 8), ("data2_fsdp2_tensor2", 1 / 4)])
def test_state_is_really_divided(mesh: str, share: float) -> None:
    large = results()[mesh]["large_arrays"]
    assert len(large) == 3 * 9  # two towers with four matrices each and the token table; parameters and two moments
    assert large == dict.fromkeys(large, share)
    # Biases and norms are whole everywhere; pooler and positions are divided over fsdp alone.
    for kind in ("params", "opt_state"):
        assert share <= results()[mesh]["share_on_a_device"][kind] < 1.6 * share


@pytest.mark.parametrize("mesh", MESHES)
def test_state_stays_where_it_belongs_and_is_donated(mesh: str) -> None:
    assert results()[mesh]["as_specified"]
    assert results()[mesh]["donated"], "every buffer of the old state must have been given to the new one"


def test_weights_are_gathered_before_use() -> None:
    """What the compiled step of fsdp=8 gathers: the matrices of the one layer, but no activations of the 16 images."""
    assert results()["one"]["gathers"] == []
    gathered = results()["fsdp8"]["gathers"]
    for weight in ([1, 32, 3, 2, 16], [1, 2, 16, 32], [1, 32, 64], [1, 64, 32]):
        assert gathered.count(weight) >= 2, "one in each tower"
    assert not [shape for shape in gathered if len(shape) > 2 and shape[0] == 16]


@pytest.mark.parametrize("mesh", MESHES)
def test_checkpoint_of_one_device_is_restored_on_any_mesh(mesh: str) -> None:
    assert results()[mesh]["restored_equal"]
    assert results()[mesh]["restored_as_specified"]
    assert results()[mesh]["progress"] == [1, 2.0, {"unreadable": 3}, "data", 0, [], 0]


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((8, 6), ("embed", "mlp"), PartitionSpec("fsdp", "tensor")),
        ((6, 8), ("embed", "mlp"), PartitionSpec(None, "tensor")),
        ((8, 7), ("embed", "mlp"), PartitionSpec("fsdp", None)),
        ((5, 8, 6), ("embed", "mlp"), PartitionSpec(None, "fsdp", "tensor")),  # stacked layers
        ((8, 3, 2, 16), ("embed", None, "heads", None), PartitionSpec("fsdp", None, "tensor", None)),
        ((8, 3, 3, 16), ("embed", None, "heads", None), PartitionSpec("fsdp", None, None, None)),
        ((8,), ("unknown",), PartitionSpec(None)),
        ((), (), PartitionSpec()),
    ],
)
def test_partition_spec(shape: tuple[int, ...], axes: tuple[str | None, ...], expected: PartitionSpec) -> None:
    assert partition_spec(shape, axes, AT_REST, {"data": 1, "fsdp": 4, "tensor": 2}) == expected


def test_partition_spec_over_two_mesh_axes() -> None:
    rules, mesh = {"batch": ("data", "fsdp")}, {"data": 2, "fsdp": 4, "tensor": 1}
    assert partition_spec((16, 3), ("batch", None), rules, mesh) == PartitionSpec(("data", "fsdp"), None)
    assert partition_spec((4, 3), ("batch", None), rules, mesh) == PartitionSpec(None, None)


def test_constrain_without_a_mesh_changes_nothing() -> None:
    x = np.ones((3, 2))
    assert constrain(x, "batch", None) is x


def test_mesh_takes_what_is_left() -> None:
    assert results()["fsdp8"]["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert results()["data2_fsdp2_tensor2"]["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert batch_shards(make_mesh(MeshConfig())) == jax.device_count()


@pytest.mark.parametrize(
    ("devices", "tensor", "limit", "expected"),
    [(256, 1, 128, (2, 128, 1)), (256, 1, 256, (1, 256, 1)), (384, 1, 128, (3, 128, 1)), (1, 1, 128, (1, 1, 1)),
     (64, 4, 128, (1, 16, 4))],
)  # fmt: skip
def test_fsdp_takes_what_divides_its_limit_and_data_the_rest(
    devices: int, tensor: int, limit: int, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(mesh_utils, "create_device_mesh", lambda sizes, *_, **__: asked.append(tuple(sizes)))
    monkeypatch.setattr("llip_jax.parallel.mesh.Mesh", lambda *_, **__: None)
    make_mesh(MeshConfig(data=-1, fsdp=-1, tensor=tensor, fsdp_limit=limit), [jax.devices()[0]] * devices)
    assert asked == [expected]


def test_parameters_that_stay_whole_are_refused_with_the_mesh_that_would_do() -> None:
    fields = {"model.vision.width": 1028, "model.vision.heads": 4, "mesh.data": 1, "mesh.fsdp": 8}
    done = run(["launch/train.py", "--config", "configs/llip_b16.py", "--check", *words(fields)], devices=8)
    assert done.returncode == 2
    assert "mesh.fsdp=8 does not divide the towers' widths, 1028 and 512, so that 67% of the parameters" in done.stderr
    assert "the largest vision/transformer/blocks/qkv [12, 1028, 3, 4, 257]" in done.stderr
    assert "Expected mesh.fsdp=4 and mesh.data=2" in done.stderr


@pytest.mark.parametrize("sizes", [MeshConfig(data=2), MeshConfig(data=-1, fsdp=3), MeshConfig(data=1, tensor=2)])
def test_mesh_that_does_not_fill_the_devices(sizes: MeshConfig) -> None:
    with pytest.raises(ConfigError, match=r"mesh: data=-?\d x fsdp=\d x tensor=\d does not fill 1 device"):
        make_mesh(sizes, jax.devices()[:1])
