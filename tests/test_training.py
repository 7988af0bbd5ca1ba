"""Training: what it learns, the optimizer's fine print, what a run leaves behind, and how it fails."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import TINY, finished_run, metrics, numbers, run, tiny_config, train, words

from llip_jax.config import CheckpointConfig, Config, OptimizerConfig, resolve
from llip_jax.config_files import LADDER, load
from llip_jax.models.dual_encoder import MAX_LOG_SCALE
from llip_jax.parallel.mesh import make_mesh
from llip_jax.training import loop
from llip_jax.training.checkpoints import Checkpoints
from llip_jax.training.flops import train_step_flops
from llip_jax.training.optimizer import decayed, learning_rate_schedule, make_optimizer
from llip_jax.training.preemption import Stopped, StopRequest
from llip_jax.training.progress import Progress
from llip_jax.training.state import TrainState, state_spec
from llip_jax.training.step import make_train_step, steering, stream_key

ALL_FIELDS = {
    "step",
    "loss",
    "examples_seen",
    "examples_per_second",
    "step_time_s",
    "data_wait_fraction",
    "mfu",
    "learning_rate",
    "grad_norm",
    "logit_scale",
    "logit_bias",
    "replaced_samples",
    "replaced_by_reason",
    "skipped_updates",
    "sample_hash",
}

# What a run leaves behind.


def test_run_directory_has_the_documented_contents() -> None:
    workdir = finished_run()
    names = {path.name for path in workdir.iterdir()}
    files = {"config.json", "data.json", "model.txt", "metrics.jsonl", "sessions.jsonl", "tokenizer.json"}
    assert names == files | {"tensorboard", "checkpoints", "eval"}
    assert resolve(json.loads((workdir / "config.json").read_text())) == tiny_config()
    assert {path.name for path in (workdir / "eval").iterdir()} == {"3.json", "6.json", "8.json"}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "6", "8"}, "the newest three"
    assert list((workdir / "tensorboard").iterdir())
    table = (workdir / "model.txt").read_text()
    assert "vision/transformer/blocks/qkv" in table
    assert "state on each device" in table


_WRITES = """
import sys
from pathlib import Path
import llip_jax.evaluate
from llip_jax.training.metrics import MetricsWriter
writer = MetricsWriter(Path({folder!r}), 0)
writer.write(1, {{"loss": 2.5}})
writer.close()
assert "torch" not in sys.modules
import torch
"""


def test_torch_is_left_alone_where_it_is_installed(tmp_path: Path) -> None:
    """Importing it would take longer than all else that a run begins with."""
    done = run(["-c", _WRITES.format(folder=str(tmp_path))])
    assert (done.returncode, done.stderr) == (0, "")
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_metrics_have_the_documented_fields_with_sane_values() -> None:
    lines = metrics(finished_run())
    assert [line["step"] for line in lines] == list(range(1, TINY["train.steps"] + 1))
    for line in lines:
        assert set(line) == ALL_FIELDS
        assert math.isfinite(line["loss"]) and line["loss"] > 0
        assert line["examples_seen"] == line["step"] * TINY["train.batch_size"]
        assert line["step_time_s"] > 0
        assert line["examples_per_second"] == pytest.approx(TINY["train.batch_size"] / line["step_time_s"])
        assert 0 <= line["data_wait_fraction"] <= 1
        assert line["mfu"] is None  # no peak is known of a CPU
        assert line["grad_norm"] > 0
        assert line["replaced_samples"] == 0 and line["replaced_by_reason"] == {}
    assert lines[0]["learning_rate"] == 0
    assert lines[0]["logit_scale"] == pytest.approx(10)
    assert lines[0]["logit_bias"] == pytest.approx(math.log(1 / 15))  # the log-odds of one match among 16
    assert len({line["sample_hash"] for line in lines}) == len(lines), "every step must see other samples"


def test_evaluation_figures_come_with_their_chance() -> None:
    results = json.loads((finished_run() / "eval/8.json").read_text())
    assert results["step"] == 8
    assert results["images"] == TINY["data.toyworld.eval_size"]
    for task in ("zero_shot", "retrieval"):
        figures = {name: value for name, value in results[task].items() if not name.endswith("median_rank")}
        assert all(0 <= value <= 1 for value in figures.values())
        assert all(f"{name}_chance" in figures for name in figures if not name.endswith("_chance"))


def test_two_runs_are_equal_and_nothing_compiles_twice(tmp_path: Path) -> None:
    done = train(tmp_path / "run", environment={"JAX_LOG_COMPILES": "1"})
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path / "run") == numbers(finished_run())
    assert done.stdout.count("evaluation after") == 3
    for function in ("train_step", "images_of", "texts_of_block", "cosines"):
        assert done.stderr.count(f"Finished XLA compilation of jit({function})") == 1, function


@pytest.mark.parametrize("seed", [1, 2])
def test_random_streams_differ_by_seed_name_and_step(seed: int) -> None:
    def bits(*arguments: Any) -> tuple[int, ...]:
        return tuple(np.asarray(jax.random.key_data(stream_key(*arguments))).tolist())

    assert bits(seed, "patch_dropout", 3) == bits(seed, "patch_dropout", 3)
    others = [(seed + 1, "patch_dropout", 3), (seed, "dropout", 3), (seed, "patch_dropout", 4)]
    assert bits(seed, "patch_dropout", 3) not in [bits(*other) for other in others]


# Learning.

PERMUTED_CAPTIONS = """
import dataclasses
from llip_jax.data.toyworld import ToyWorld
record = ToyWorld.__getitem__
def with_captions_of_another(self, index):
    other = record(self, (37 * index + 11) % len(self)) if self.split == "train" else record(self, index)
    return dataclasses.replace(record(self, index), captions=other.captions)
ToyWorld.__getitem__ = with_captions_of_another
"""


@pytest.mark.slow
def test_learns_what_captions_say_and_nothing_from_permuted_ones(tmp_path: Path) -> None:
    steps = 50
    fields = {
        "train.steps": steps,
        "train.batch_size": 64,
        "optimizer.learning_rate": 6e-3,
        "optimizer.warmup_steps": 5,
        "checkpoint.every_steps": steps,
        "eval.every_steps": steps,
        "eval.batch_size": 64,
        "model.patch_dropout": 0,
        "model.text.length": 24,
        "data.tokenizer.vocabulary_size": 512,
        "data.toyworld.train_size": 2000,
        "data.toyworld.eval_size": 64,
        "data.toyworld.aspects": (3, 5),
    }
    last_loss: dict[str, float] = {}
    recall: dict[str, dict[str, float]] = {}
    for name, hook in (("right", ""), ("permuted", PERMUTED_CAPTIONS)):
        done = train(tmp_path / name, fields, hook=hook)
        assert done.returncode == 0, done.stderr
        losses = [line["loss"] for line in metrics(tmp_path / name)]
        assert np.mean(losses[-10:]) < losses[0] - 0.5
        last_loss[name] = float(np.mean(losses[-10:]))
        recall[name] = json.loads((tmp_path / name / f"eval/{steps}.json").read_text())["retrieval"]
    figure = "image_to_text_recall_at_10"
    # Measured: losses of 4.7 and 5.2, recalls of 0.6 and 0.1, where 0.15 is chance.
    assert last_loss["right"] < last_loss["permuted"] - 0.2
    assert recall["right"][figure] > 2.5 * recall["right"][f"{figure}_chance"]
    assert recall["permuted"][figure] < 2 * recall["permuted"][f"{figure}_chance"]


# The optimizer.


def abstract_state(config: Config) -> TrainState:
    return state_spec(config, make_optimizer(config.optimizer, config.train.steps), make_mesh(config.mesh)).abstract


@pytest.mark.parametrize("pooler", ["mixer", "average", "registers", "class_token"])
def test_weight_decay_covers_matrices_and_tokens_only(pooler: str) -> None:
    params = abstract_state(tiny_config(model={"pooler": pooler})).params
    flags = {
        jax.tree_util.keystr(path, simple=True, separator="/"): flag
        for path, flag in jax.tree_util.tree_leaves_with_path(decayed(params))
    }
    matrices = ("qkv", "out", "up", "down")
    blocks = {f"{tower}/transformer/blocks/{name}" for tower in ("vision", "text") for name in matrices}
    towers = {"vision/patch_kernel", "vision/tokens", "vision/positions", "text/embedding", "text/positions"}
    poolers = {
        "mixer": {"query", "key", "value", "output", "text"},
        "average": {"logits", "value", "output", "text"},
        "registers": {"image", "text"},
        "class_token": {"image", "text"},
    }
    expected = blocks | towers | {f"pooler/{name}" for name in poolers[pooler]}
    assert {name for name, flag in flags.items() if flag} == expected
    for name in set(flags) - expected:
        assert name in ("log_scale", "bias") or name.endswith(("_bias", "/bias", "/scale")), name


def test_weight_decay_shrinks_exactly_those() -> None:
    """With gradients of zero, AdamW's update is the decay alone."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    params = {"up": jnp.ones(3), "up_bias": jnp.ones(3), "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
    params |= {"log_scale": jnp.float32(1), "bias": jnp.float32(1)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates.pop("up"), -0.05, rtol=1e-6)
    assert all(not np.any(x) for x in jax.tree.leaves(updates))


def test_schedule() -> None:
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=0.4, warmup_steps=10), steps=110)
    assert float(schedule(0)) == 0
    assert float(schedule(5)) == pytest.approx(0.2)
    assert float(schedule(10)) == pytest.approx(0.4)
    assert float(schedule(60)) == pytest.approx(0.2)  # half of the cosine
    assert float(schedule(110)) == pytest.approx(0, abs=1e-8)


def test_schedule_without_and_with_too_long_a_warm_up() -> None:
    without = learning_rate_schedule(OptimizerConfig(learning_rate=0.4, warmup_steps=0), steps=10)
    assert float(without(0)) == pytest.approx(0.4)
    short = learning_rate_schedule(OptimizerConfig(learning_rate=0.4, warmup_steps=2000), steps=10)
    assert [float(short(step)) for step in (0, 5, 10)] == pytest.approx([0, 0.2, 0.4])


def test_logit_scale_stops_at_100_or_where_it_began() -> None:
    """With updates of a twentieth in its logarithm."""
    config = tiny_config(optimizer={"learning_rate": 0.05, "warmup_steps": 0})
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        spec = state_spec(config, optimizer, mesh)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), spec.abstract.params)
        params["bias"] = jnp.float32(-200)  # far from sure of any match
        # The same picture and caption in every row leaves only matches, which a larger scale serves.
        batch = {
            "image": jnp.zeros((16, 16, 16, 3), jnp.uint8),
            "text": jnp.ones((16, 1, 12), jnp.int32),
            "text_mask": jnp.ones((16, 1, 12), jnp.int32),
            "caption_weight": jnp.ones((16, 1)),
            "image_group": jnp.zeros(16, jnp.int32),
            "text_group": jnp.zeros((16, 1), jnp.int32),
            "replaced": jnp.zeros(16, jnp.int32),
            **steering(16),
        }
        step = jax.jit(make_train_step(config, spec, optimizer))
        for first, last in ((99.9, 100.0), (117.3, 117.3)):
            own = params | {"log_scale": jnp.log(jnp.float32(first))}
            state, scales = TrainState(jnp.int32(0), own, optimizer.init(own)), []
            for _ in range(3):
                state, values = step(state, batch)
                scales.append(float(values["logit_scale"]))
            assert scales == pytest.approx([first, last, last])
            assert float(state.params["log_scale"]) == np.float32(max(MAX_LOG_SCALE, np.log(np.float32(first))))


# Failing.


INFINITE_BATCH = """
from llip_jax.training import loop
train_batches = loop.train_batches
def with_an_infinite_one(*arguments, start_step, **options):
    for step, batch in enumerate(train_batches(*arguments, start_step=start_step, **options), start=start_step + 1):
        if step == 5:
            batch["caption_weight"][3] = float("inf")
        yield batch
loop.train_batches = with_an_infinite_one
"""


@pytest.mark.parametrize(
    ("hook", "fields"),
    [
        (INFINITE_BATCH, {}),
        pytest.param("", {"optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0}, marks=pytest.mark.slow),
    ],
)
def test_divergence_names_the_step_and_keeps_what_was_good(tmp_path: Path, hook: str, fields: dict[str, Any]) -> None:
    """Even where every step is saved, what is saved comes from before."""
    done = train(tmp_path, {"checkpoint.every_steps": 1, "eval.every_steps": 100} | fields, hook=hook)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    named = [line for line in done.stderr.splitlines() if line.startswith("error: step ")]
    assert len(named) == 1
    assert "not finite" in named[0]
    step = int(named[0].split()[2].rstrip(":"))
    assert step == 5 if hook else step > 1
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, step))

    config = tiny_config()
    kept = Checkpoints(tmp_path / "checkpoints", config.checkpoint, read_only=True)
    assert kept.latest == step - 1
    state, progress = kept.restore(step - 1, abstract_state(config))
    assert int(state.step) == step - 1
    assert progress.examples_seen == (step - 1) * config.train.batch_size


# Checkpoints.


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CheckpointConfig(keep=2), [5, 6]),
        (CheckpointConfig(keep=1), [6]),
        (CheckpointConfig(keep=2, keep_every_steps=3), [3, 5, 6]),
    ],
)
def test_which_checkpoints_are_kept(tmp_path: Path, config: CheckpointConfig, expected: list[int]) -> None:
    checkpoints = Checkpoints(tmp_path, config)
    for step in range(1, 7):
        state = TrainState(jnp.int32(step), {"w": jnp.full(3, step, jnp.float32)}, ())
        checkpoints.save(state, Progress(step, 0.0, 0, "data"))
    checkpoints.close()
    again = Checkpoints(tmp_path, config, read_only=True)
    assert again.steps == expected
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for step in expected:
        restored, progress = again.restore(step, abstract)
        np.testing.assert_array_equal(restored.params["w"], np.full(3, step))
        assert progress == Progress(step, 0.0, 0, "data")


def test_saving_a_step_again_does_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    state = TrainState(jnp.int32(1), {"w": jnp.zeros(3)}, ())
    for examples in (1, 2):
        checkpoints.save(state, Progress(examples, 0.0, 0, "data"))
    checkpoints.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    assert checkpoints.restore(1, abstract)[1].examples_seen == 1
    checkpoints.close()


# Signals.


def test_stop_request_remembers_the_first_signal_and_gives_the_handlers_back() -> None:

    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"
        with pytest.raises(Stopped):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


# Counting.


@pytest.mark.parametrize(
    "pooler", ["mixer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("average", "registers"))]
)
def test_flops_agree_with_the_compiler(pooler: str) -> None:
    """The compiler also counts norms, activations, losses and the optimizer, a few percent here."""
    model = {"pooler": pooler, "embed_dim": 64, "image_size": 32, "text.length": 24, "scan_layers": False}
    model |= {"vision.width": 64, "vision.mlp": 256, "text.width": 64, "text.mlp": 256}
    config = tiny_config(model=model, train={"batch_size": 8})
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        spec = state_spec(config, optimizer, mesh)
        compiled = loop.compile_step(make_train_step(config, spec, optimizer), config, spec, mesh)
    assert train_step_flops(config) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.12)


def test_flops_of_b16_by_hand() -> None:
    """SigLIP B/16 at 224 pixels and 77 tokens; a ViT-B/16 is known to take 17.6 billion multiply-adds an image."""
    config = load("configs/llip_b16.py:siglip", ["train.batch_size=2"])
    block = {width: 2 * 12 * width**2 for width in (768, 512)}  # a token, both halves of a block
    vision = 12 * (197 * block[768] + 4 * 197**2 * 768) + 2 * 196 * 768 * 768
    text = 12 * (77 * block[512] + 4 * 77**2 * 512)
    projections = 2 * 768 * 512 + 2 * 512 * 512
    pair = 2 * 512
    assert vision == pytest.approx(2 * 17.58e9, rel=0.01)
    assert train_step_flops(config) == pytest.approx(3 * (2 * (vision + text + projections) + 4 * pair))


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in LADDER if name])
def test_every_rung_trains(tmp_path: Path, variant: str) -> None:
    fields = TINY | {"model.mixture_tokens": 1 if variant in ("siglip", "clip") else 4}
    config = f"configs/llip_demo.py:{variant}"
    done = run(["launch/train.py", "--config", config, "--workdir", str(tmp_path), *words(fields)])
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path)[-1]["loss"] < metrics(tmp_path)[0]["loss"]


def test_state_is_float32_and_steps_are_counted() -> None:
    state = abstract_state(load("configs/llip_demo.py", ["model.dtype=bfloat16"]))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.opt_state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
