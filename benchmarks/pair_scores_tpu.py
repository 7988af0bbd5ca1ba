"""Memory and traffic of the pair scores on a TPU slice, from the TPU's own compiler. Needs libtpu, and no TPU.

    python benchmarks/pair_scores_tpu.py [--topology v5e:16x16] [--sizes B/16 G/14] [--batch 32768]
                                         [--implementation streamed|kernel] [--exchange ring|gather]

Compiles loss and gradient of the pair scores alone, in bfloat16, images and texts divided over all chips. One JSON line
for each model size: temporaries of a chip, the largest array of each kind of collective, and whether transfers run
beside computation (a start and a done in place of one operation).
"""

import os

# Before the libraries look for a TPU that is not there.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import importlib.metadata
import json
import math
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llip_jax.command_line import run
from llip_jax.config import ConfigError, PairScoresConfig, nearest
from llip_jax.models.sizes import SIZES
from llip_jax.objectives.losses import SigmoidLoss
from llip_jax.objectives.pairs import pair_ids, pair_targets
from llip_jax.ops.pair_blocks import prepare
from llip_jax.ops.pair_kernel import with_kernel
from llip_jax.ops.pair_loss import pair_loss
from llip_jax.ops.pair_scores import Affine, MixtureSide, TextSide
from llip_jax.ops.plan import make_plan
from llip_jax.parallel.mesh import AXES, neighbour_ring
from llip_jax.parallel.sharding import batch_sharding

TOKENS, HEADS, TEMPERATURE = 64, 8, 5.0
COLLECTIVES = ("collective-permute", "all-gather", "reduce-scatter", "all-to-all", "all-reduce")


def compile_for(topology: str, size: str, batch: int, settings: PairScoresConfig) -> dict[str, Any]:
    """What the compiler says of one model size at this global batch."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.make_mesh((1, len(devices), 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    ring = neighbour_ring(mesh)
    d = SIZES[size].embed_dim
    divided, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def abstract(*dims: int, dtype: Any = jnp.bfloat16, sharding: Any = divided) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    tokens = abstract(batch, TOKENS, HEADS, d // HEADS)
    scalar = abstract(dtype=jnp.float32, sharding=whole)
    inputs = (
        (tokens, tokens, abstract(d, d, sharding=whole)),
        (abstract(batch, d), abstract(batch, HEADS, d // HEADS)),
        Affine(scalar, scalar),
    )
    groups = (
        abstract(batch, dtype=jnp.int32),
        abstract(batch, 1, dtype=jnp.int32),
        abstract(batch, 1, dtype=jnp.float32),
    )
    facts: dict[str, Any] = {}

    def loss(images: Any, texts: Any, affine: Affine, groups: Any) -> jax.Array:
        prepared = prepare(MixtureSide(*images, TEMPERATURE), TextSide(*texts))
        if settings.implementation == "kernel":
            prepared = with_kernel(prepared)
        plan = make_plan(prepared, settings, ring)
        facts.update(scorer=type(prepared.scorer).__name__, image_block=plan.sizes.images, text_block=plan.sizes.texts)
        targets = SigmoidLoss(lambda i, t: pair_targets(i, t, "ignore"))
        return pair_loss(targets, prepared, affine, *pair_ids(*groups), plan)[0]

    begun = time.perf_counter()
    with jax.set_mesh(mesh):
        shardings = (whole, jax.tree.map(lambda x: x.sharding, inputs))
        both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), out_shardings=shardings)
        program = both.lower(*inputs, groups).compile()
    memory = program.memory_analysis()
    return {
        "topology": topology,
        "size": size,
        "batch": batch,
        "implementation": settings.implementation,
        **facts,
        "exchange": settings.exchange,
        "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "arguments_mib": round(memory.argument_size_in_bytes / 2**20, 1),
        "collectives": collectives(program.as_text()),
        "compile_s": round(time.perf_counter() - begun, 1),
    }


def collectives(text: str) -> dict[str, Any]:
    """By kind: how many, how many of them beside computation, and numbers in the largest array that one moves."""
    found: dict[str, Any] = {}
    for shapes, kind, start in re.findall(rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(-start)?\(", text):
        sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\[([\d,]*)\]", shapes)]
        entry = found.setdefault(kind, {"count": 0, "asynchronous": 0, "largest": 0})
        entry["count"] += 1
        entry["asynchronous"] += bool(start)
        entry["largest"] = max(entry["largest"], *sizes)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--sizes", nargs="+", default=["B/16", "G/14"])
    parser.add_argument("--batch", type=int, default=32_768)
    parser.add_argument("--implementation", choices=("streamed", "kernel"), default="streamed")
    parser.add_argument("--exchange", choices=("ring", "gather"), default="ring")
    args = parser.parse_args(argv)
    for size in args.sizes:
        if size not in SIZES:
            raise ConfigError(f"--sizes: no size named {size!r}.{nearest(size, list(SIZES))}")
        settings = PairScoresConfig(implementation=args.implementation, exchange=args.exchange)
        line = compile_for(args.topology, size, args.batch, settings)
        versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
        print(json.dumps({**line, **versions, "date": time.strftime("%Y-%m-%d")}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
