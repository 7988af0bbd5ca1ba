"""Time, memory and error of the pair scores' implementations, and of other libraries' on the same pairs.

    python benchmarks/pair_scores.py [--shape N,J,K,M,D] [--implementations NAME ...] [--dtype float32|bfloat16]
    python benchmarks/pair_scores.py --memory          compiles only, and counts what torch keeps for its backward pass
    python benchmarks/pair_scores.py --score           scores all pairs once, to the host, as retrieval does

One JSON line for each implementation: median milliseconds of the loss (sigmoid) and of the loss with all gradients, the
compiler's temporaries, FLOPs as counted (multiply-adds x 2 that this implementation asks for), and the largest relative
error of loss and gradients against float64 on 32 images and texts. Implementations take turns (A B C A B C), so that
a machine whose speed drifts favours none. K = 0 means one vector an image (SigLIP).

    torch_attention   torch.nn.MultiheadAttention over all pairs, its projections inside, in the manner of FLAIR
    open_clip         SigLipLoss on normalised features, texts in blocks of N as from so many devices
"""

import argparse
import contextlib
import importlib.util
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llip_jax.command_line import run
from llip_jax.config import ConfigError, MeshConfig, PairScoresConfig
from llip_jax.evaluation.scoring import score
from llip_jax.objectives.losses import SigmoidLoss
from llip_jax.objectives.pairs import ImageIds, TextIds, pair_targets
from llip_jax.ops.pair_blocks import mixture_multiply_adds, prepare
from llip_jax.ops.pair_kernel import with_kernel
from llip_jax.ops.pair_loss import pair_loss
from llip_jax.ops.pair_scores import Affine, FixedSide, ImageSide, MixtureSide, TextSide, cosines
from llip_jax.ops.plan import make_plan
from llip_jax.parallel.mesh import make_mesh
from llip_jax.parallel.sharding import batch_sharding
from llip_jax.training.metrics import progress_bar

TEMPERATURE = 5.0
LOSS = SigmoidLoss(lambda images, texts: pair_targets(images, texts, "ignore"))
OURS = ("streamed", "gather", "kernel", "dense")
PEERS = ("torch_attention", "open_clip")


class Shape(NamedTuple):
    """N images, J texts, K tokens in M heads (0: one vector an image), joint width d."""

    n: int
    j: int
    k: int
    m: int
    d: int


class Arrays(NamedTuple):
    """What gradients are taken of. Images are keys, values and output projection, or None, embedding and None."""

    keys: Any
    values: Any
    output: Any
    text: Any
    queries: Any


class Measured(NamedTuple):
    """An implementation ready to run: forward, forward and backward, and what is known beforehand."""

    forward: Callable[[], None]
    both: Callable[[], None]
    facts: dict[str, Any]


def random_arrays(shape: Shape, dtype: Any = np.float32) -> Arrays:
    rng = np.random.default_rng(0)
    n, j, k, m, d = shape
    if k == 0:
        images, texts = (rng.normal(size=(rows, d)).astype(dtype) for rows in (n, j))
        return Arrays(None, images, None, texts, None)
    keys, values = (rng.normal(size=(n, k, m, d // m)).astype(dtype) for _ in range(2))
    output = (rng.normal(size=(d, d)) / d**0.5).astype(dtype)
    return Arrays(keys, values, output, rng.normal(size=(j, d)).astype(dtype),
                  rng.normal(size=(j, m, d // m)).astype(dtype))  # fmt: skip


def affine() -> Affine:
    return Affine(jnp.float32(10.0), jnp.float32(-10.0))


def sides(x: Arrays) -> tuple[ImageSide, TextSide]:
    if x.keys is None:
        return FixedSide(x.values), TextSide(x.text)
    return MixtureSide(x.keys, x.values, x.output, TEMPERATURE), TextSide(x.text, x.queries)


def ids(shape: Shape) -> tuple[ImageIds, TextIds]:
    """All different: text i belongs to image i, and texts from N on to none."""
    n, j = jnp.arange(shape.n), jnp.arange(shape.j)
    return ImageIds(n, n, n[:, None], jnp.ones((shape.n, 1), bool)), TextIds(j, j, j, jnp.ones(shape.j))


def loss_function(implementation: str, shape: Shape) -> Callable[[Arrays, Affine], jax.Array]:
    def dense(x: Arrays, affine: Affine) -> jax.Array:
        logits = affine.scale * cosines(*sides(x)) + affine.bias
        return LOSS.value(LOSS.statistics(logits, *ids(shape), jnp.ones(logits.shape, bool)))

    def streamed(x: Arrays, affine: Affine) -> jax.Array:
        exchange: Any = "gather" if implementation == "gather" else "ring"
        prepared = prepare(*sides(x))
        if implementation == "kernel":
            prepared = with_kernel(prepared)
        return pair_loss(LOSS, prepared, affine, *ids(shape), make_plan(prepared, PairScoresConfig(exchange=exchange)))[
            0
        ]

    return dense if implementation == "dense" else streamed


def multiply_adds(implementation: str, shape: Shape) -> tuple[float, float]:
    """That the implementation asks for: forward, forward and backward."""
    n, j, k, m, d = shape
    if k == 0:
        return n * j * d, 3 * n * j * d
    if implementation == "dense":
        return n * j * (2 * k * d + d**2), 3 * n * j * (2 * k * d + d**2)
    forward, both = (n * count for count in mixture_multiply_adds(j, k, m, d // m))
    return forward, both if implementation != "kernel" else forward + both  # the kernel's backward pass starts over


def ours(implementation: str, shape: Shape, dtype: Any, devices: int) -> Measured:
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    divided, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        function = loss_function(implementation, shape)
        x = random_arrays(shape)
        x = Arrays(*(y if y is None else jax.device_put(jnp.asarray(y, dtype), whole if name == "output" else divided)
                     for name, y in x._asdict().items()))  # fmt: skip
        inputs = x, jax.device_put(affine(), whole)
        forward = jax.jit(function).lower(*inputs).compile()
        gradients = jax.tree.map(lambda y: y.sharding, inputs)
        both = jax.jit(jax.value_and_grad(function, argnums=(0, 1)), out_shardings=(whole, gradients))
        compiled = both.lower(*inputs).compile()
    facts = {"temporaries_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 2)}
    return Measured(
        lambda: jax.block_until_ready(forward(*inputs)), lambda: jax.block_until_ready(compiled(*inputs)), facts
    )


def error_against_float64(implementation: str, shape: Shape, dtype: Any) -> float:
    """Largest of loss and gradients on a corner of the shape."""
    corner = shape._replace(n=min(shape.n, 32), j=min(shape.j, 32))
    x = jax.tree.map(lambda y: jnp.asarray(y, dtype), random_arrays(corner))
    actual = jax.jit(jax.value_and_grad(loss_function(implementation, corner), argnums=(0, 1)))(x, affine())
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda y: jnp.asarray(np.asarray(y, np.float64)), (x, affine()))
        expected = jax.jit(jax.value_and_grad(loss_float64(corner), argnums=(0, 1)))(*exact)
        errors = jax.tree.map(
            lambda a, b: float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()), actual, expected
        )
    return max(jax.tree.leaves(errors))


def loss_float64(shape: Shape) -> Callable[[Arrays, Affine], jax.Array]:
    """The definition, without any of the package's functions (they compute in float32)."""

    def unit(x: jax.Array) -> jax.Array:
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def loss(x: Arrays, affine: Affine) -> jax.Array:
        if x.keys is None:
            cosine = unit(x.values) @ unit(x.text).T
        else:
            weights = jax.nn.softmax(jnp.einsum("jmh,nkmh->njmk", x.queries, x.keys) / TEMPERATURE, axis=-1)
            mixed = jnp.einsum("njmk,nkmh->njmh", weights, x.values).reshape(shape.n, shape.j, shape.d)
            cosine = jnp.einsum("njd,jd->nj", unit(mixed @ x.output), unit(x.text))
        sign = jnp.where(jnp.eye(shape.n, shape.j, dtype=bool), 1.0, -1.0)
        return -jax.nn.log_sigmoid(sign * (affine.scale * cosine + affine.bias)).sum() / shape.n

    return loss


def torch_attention(shape: Shape) -> Measured:
    """Tokens and texts at width d go in; the module projects them, the texts anew for every image."""
    import torch

    n, j, k, m, d = shape
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(d, m, bias=False, batch_first=True)
    tokens, texts = torch.randn(n, k, d, requires_grad=True), torch.randn(j, d, requires_grad=True)
    sign = 2 * torch.eye(n, j) - 1

    def loss() -> Any:
        mixed, _ = attention(texts.expand(n, j, d), tokens, tokens, need_weights=False)
        unit, target = (torch.nn.functional.normalize(x, dim=-1) for x in (mixed, texts))
        return -torch.nn.functional.logsigmoid(sign * (10 * (unit * target).sum(-1) - 10)).sum() / n

    return torch_measured(loss, (tokens, texts, *attention.parameters()))


def open_clip_loss(shape: Shape) -> Measured:
    """What one of J / N devices computes and keeps: its own block and every other device's texts."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from open_clip.loss import SigLipLoss

    module = SigLipLoss()
    images, texts = (torch.randn(rows, shape.d, requires_grad=True) for rows in (shape.n, shape.j))
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -10.0))

    def loss() -> Any:
        unit, target = (torch.nn.functional.normalize(x, dim=-1) for x in (images, texts))
        blocks = [
            module._loss(unit, block, scale, bias, negative_only=i > 0) for i, block in enumerate(target.split(shape.n))
        ]
        return sum(blocks)

    return torch_measured(loss, (images, texts, scale, bias))


def torch_measured(loss: Callable[[], Any], inputs: tuple[Any, ...]) -> Measured:
    import torch

    kept: dict[int, int] = {}

    def pack(x: Any) -> Any:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = loss()
    mib = sum(kept.values()) / 2**20
    del held

    def forward() -> None:
        with torch.no_grad():
            loss()

    return Measured(forward, lambda: torch.autograd.grad(loss(), inputs), {"kept_for_backward_mib": round(mib, 2)})


def milliseconds(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - begun)


def about_this_machine() -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def time_all(shape: Shape, names: list[str], dtype_name: str, devices: int, repeats: int) -> Iterator[dict[str, Any]]:
    dtype = jnp.dtype(dtype_name)
    peers = {"torch_attention": torch_attention, "open_clip": open_clip_loss}
    measured = {name: peers[name](shape) if name in peers else ours(name, shape, dtype, devices) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name, one in measured.items():
            own = milliseconds(one.forward), milliseconds(one.both)
            if turn > 0:
                times[name].append(own)
    for name, one in measured.items():
        forward, both = (float(np.median(x)) for x in zip(*times[name], strict=True))
        line: dict[str, Any] = {
            "implementation": name, **shape._asdict(), "dtype": dtype_name if name not in peers else "float32",
            "devices": devices if name not in peers else 1, "forward_ms": round(forward, 2), "both_ms": round(both, 2),
            "both_ms_range": [round(f([b for _, b in times[name]]), 2) for f in (min, max)], **one.facts,
        }  # fmt: skip
        if name not in peers:
            counts = multiply_adds(name, shape)
            line["tflops_forward"], line["tflops_both"] = (
                round(2 * count / ms / 1e9, 4) for count, ms in zip(counts, (forward, both), strict=True)
            )
            line["error"] = float(f"{error_against_float64(name, shape, dtype):.2g}")
        yield line


def memory_curves(shape: Shape, peers: list[str]) -> Iterator[dict[str, Any]]:
    """Growth with texts at N fixed; growth with devices at N fixed on each."""
    dtype = jnp.dtype("float32")
    for j in (512, 1024, 2048, 4096, 8192, 16_384, 32_768):
        own = shape._replace(j=j)
        for name in ("streamed", "dense"):
            yield {"curve": "texts", "implementation": name, **own._asdict(), **ours(name, own, dtype, 1).facts}
        if "torch_attention" in peers and shape.k and j <= 4096:
            yield {"curve": "texts", "implementation": "torch_attention", **own._asdict(), **torch_attention(own).facts}
        if "open_clip" in peers:
            fixed = own._replace(k=0, m=0)
            yield {"curve": "texts", "implementation": "open_clip", **fixed._asdict(), **open_clip_loss(fixed).facts}
            yield {"curve": "texts", "implementation": "streamed", **fixed._asdict(),
                   **ours("streamed", fixed, dtype, 1).facts}  # fmt: skip
    for devices in (1, 2, 4, 8):
        own = shape._replace(n=shape.n * devices, j=shape.n * devices)
        for name in ("streamed", "gather", "dense"):
            facts = ours(name, own, dtype, devices).facts
            yield {"curve": "devices", "implementation": name, **own._asdict(), "devices": devices, **facts}


def score_once(shape: Shape) -> dict[str, Any]:
    """Seconds and the host's peak memory, with the images on the host."""
    images, texts = sides(random_arrays(shape))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with progress_bar(shape.n, 0, "image", "scoring") as bar:
        begun = time.perf_counter()
        score(images, texts, progress=bar.update)
        seconds = time.perf_counter() - begun
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "score": "all pairs", **shape._asdict(), "seconds": round(seconds, 2),
        "pairs_per_second": round(shape.n * shape.j / seconds), "peak_memory_growth_mib": round(grown / 2**10),
        "of_that_the_scores_mib": round(shape.n * shape.j * 4 / 2**20),
    }  # fmt: skip


def installed_peers() -> list[str]:
    found = [
        peer for peer, module in zip(PEERS, ("torch", "open_clip"), strict=True) if importlib.util.find_spec(module)
    ]
    for peer in set(PEERS) - set(found):
        print(f"without {peer}: not installed", file=sys.stderr)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="256,256,64,8,512", help="N,J,K,M,D (K = 0: one vector an image)")
    parser.add_argument("--implementations", nargs="+", choices=(*OURS, *PEERS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--devices", type=int, default=1, help="on a CPU, so many are simulated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--score", action="store_true")
    args = parser.parse_args(argv)
    try:
        shape = Shape(*map(int, args.shape.split(",")))
    except (TypeError, ValueError):
        raise ConfigError(f"--shape: expected five whole numbers N,J,K,M,D, got {args.shape!r}") from None
    if min(shape.n, shape.j, shape.d) < 1 or min(shape.k, shape.m) < 0 or (shape.k and shape.d % max(shape.m, 1)):
        raise ConfigError(f"--shape: expected N, J, d of at least 1 and M heads that divide d, got {args.shape!r}")
    if args.repeats < 1:
        raise ConfigError(f"--repeats: expected at least 1, got {args.repeats}")
    if args.devices < 1 or shape.n % args.devices or shape.j % args.devices:
        raise ConfigError(f"--devices: {args.devices} do not divide {shape.n} images and {shape.j} texts")
    jax.config.update("jax_num_cpu_devices", max(args.devices, 8 if args.memory else 1))
    peers = [] if args.score else installed_peers()
    lines: Iterable[dict[str, Any]]
    if args.score:
        lines = [score_once(shape)]
    elif args.memory:
        lines = memory_curves(shape, peers)
    else:
        fitting = [name for name in peers if (name == "torch_attention") == (shape.k > 0)]
        names = args.implementations or ["streamed", "dense", *fitting]
        if "kernel" in names and (jax.default_backend() != "tpu" or not shape.k):
            raise ConfigError("--implementations: 'kernel' needs a TPU and images with tokens (K > 0)")
        lines = time_all(shape, names, args.dtype, args.devices, args.repeats)
    for line in lines:
        print(json.dumps({**line, **about_this_machine()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
