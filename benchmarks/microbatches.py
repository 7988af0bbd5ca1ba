"""Memory of one training step with its batch in pieces, by the compiler's own account; nothing is run.

    python benchmarks/microbatches.py --config configs/llip_demo.py [--config.FIELD=VALUE ...] [--pieces 1 2 4]

Prints one JSON line for each number of pieces (train.microbatches).
"""

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

import jax

from llip_jax.command_line import run, split_overrides
from llip_jax.config import Config
from llip_jax.config_files import load
from llip_jax.objectives.microbatches import check_microbatches
from llip_jax.parallel.mesh import batch_shards, make_mesh
from llip_jax.training.loop import compile_step
from llip_jax.training.optimizer import make_optimizer
from llip_jax.training.state import state_spec
from llip_jax.training.step import make_train_step


def measured(config: Config) -> dict[str, Any]:
    """What the compiler says of the step."""
    mesh = make_mesh(config.mesh)
    check_microbatches(config, batch_shards(mesh))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    spec = state_spec(config, optimizer, mesh)
    begun = time.perf_counter()
    compiled: Any = compile_step(make_train_step(config, spec, optimizer), config, spec, mesh)
    memory = compiled.memory_analysis()
    return {
        "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "state_and_batch_mib": round(memory.argument_size_in_bytes / 2**20, 1),
        "compile_s": round(time.perf_counter() - begun, 1),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--pieces", type=int, nargs="+", default=[1, 2, 4])
    words, overrides = split_overrides(argv)
    args = parser.parse_args(words)
    config = load(args.config, overrides)
    for pieces in args.pieces:
        own = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=pieces))
        line = {
            "config": args.config,
            "overrides": overrides,
            "batch_size": config.train.batch_size,
            "microbatches": pieces,
            **measured(own),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "jax": jax.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
