"""Time and memory of one training step, without data or checkpoints.

    python benchmarks/train_step.py --config configs/llip_demo.py [--config.FIELD=VALUE ...] [--versus FIELD=VALUE ...]

Prints one JSON line for the configuration, and with --versus a second one for the same configuration with those fields
changed, the two measured in turn (A B A B ...) so that a machine whose speed drifts favours neither.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llip_jax.command_line import run, split_overrides
from llip_jax.config import Config
from llip_jax.config_files import load
from llip_jax.parallel.mesh import make_mesh
from llip_jax.training.flops import train_step_flops
from llip_jax.training.loop import compile_step
from llip_jax.training.optimizer import make_optimizer
from llip_jax.training.state import init_state, state_spec
from llip_jax.training.step import make_train_step, steering, step_inputs


def random_batch(config: Config) -> dict[str, np.ndarray]:
    """Noise images and texts of full length, no two alike."""
    rng = np.random.default_rng(0)
    n, slots, length = config.train.batch_size, config.data.captions.slots, config.model.text.length
    side = config.model.image_size
    return {
        "image": rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8),
        "text": rng.integers(3, 300, (n, slots, length), dtype=np.int32),
        "text_mask": np.ones((n, slots, length), np.int32),
        "caption_weight": np.full((n, slots), 1 / slots, np.float32),
        "image_group": np.arange(n, dtype=np.int32),
        "text_group": np.arange(n * slots, dtype=np.int32).reshape(n, slots),
        "replaced": np.zeros(n, np.int32),
        **steering(n),
    }


def prepare(config: Config) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that takes one step and says how many seconds it took, and what is known before any step."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        spec = state_spec(config, optimizer, mesh)
        begun = time.perf_counter()
        compiled: Any = compile_step(make_train_step(config, spec, optimizer), config, spec, mesh)
        compile_s = time.perf_counter() - begun
        state = init_state(config, optimizer, spec)
        inputs = step_inputs(config, mesh)
        batch = {name: jax.device_put(x, inputs[name].sharding) for name, x in random_batch(config).items()}

    def step() -> float:
        nonlocal state
        begun = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - begun

    step()
    return step, {
        "compile_s": round(compile_s, 2),
        "temporaries_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "gflops": round(train_step_flops(config) / 1e9, 1),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--versus", nargs="+", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--repeats", type=int, default=10)
    words, overrides = split_overrides(argv)
    args = parser.parse_args(words)
    arms = [overrides, [*overrides, *args.versus]] if args.versus else [overrides]
    steps, known = zip(*(prepare(load(args.config, arm)) for arm in arms), strict=True)
    seconds = np.asarray([[step() for step in steps] for _ in range(args.repeats)])
    for arm, facts, own in zip(arms, known, seconds.T, strict=True):
        line = {
            "config": args.config,
            "overrides": arm,
            "median_step_s": round(float(np.median(own)), 4),
            "min_step_s": round(float(own.min()), 4),
            **facts,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
