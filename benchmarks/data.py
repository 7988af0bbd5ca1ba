"""Images a second a core of the input pipeline, and of the ones a user would otherwise pick, on the same shards.

    python benchmarks/data.py [--shards DIR] [--arms NAME ...] [--repeats N] [--seconds S] [--out FILE]
    python benchmarks/data.py --quick          a smoke test: each pipeline once, for a second, on few pictures

The task: shuffle, decode, random resized crop of 90 to 100 % of the area to 224 x 224, 77 CLIP tokens, batches of 128.
An arm runs in a process of its own; it and all its processes and threads, the reader of the batches included, are
pinned to the cores that it is said to use. Shards are in the page cache. Arms take turns (A B C A B C), so that a
machine whose speed drifts favours none. One JSON line for each arm and set of pictures, and a table on stderr. Arms
whose packages are not installed are left out, and the reason given.

    ours                  llip_jax, uint8 to the device
    open_clip             open_clip's own training data, float32 to the device
    webdataset            webdataset with torchvision's crop on uint8 tensors, uint8 to the device
    tf_data               big_vision's preprocessing: bilinear without antialiasing, float32 to the device
    tf_data_bicubic       the same, bicubic with antialiasing as all others

Needs psutil. Peers: open_clip_torch[training] (open_clip, webdataset), tensorflow-cpu.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import data_peers
import numpy as np
import psutil
from data_peers import BATCH_SIZE, CROP_SCALE, IMAGE_SIZE, TEXT_LENGTH, Batches
from data_shards import ShardSet, shard_set


def ours(shards: ShardSet, workers: int, threads: int) -> Batches:
    # Here, so that nobody else's memory holds them.
    from llip_jax.config import AugmentConfig, DataConfig
    from llip_jax.data.pipeline import train_batches
    from llip_jax.data.sources import build_source
    from llip_jax.data.tokenizers import ClipTokenizer

    config = DataConfig(
        source="webdataset",
        path=shards.pattern,
        index_dir=str(shards.path / "index"),
        augment=AugmentConfig(crop_scale=CROP_SCALE),
        workers=workers,
        threads=threads,
    )
    yield from train_batches(
        build_source(config, "train", IMAGE_SIZE),
        ClipTokenizer(),
        config,
        image_size=IMAGE_SIZE,
        text_length=TEXT_LENGTH,
        seed=0,
        batch_size=BATCH_SIZE,
        start_step=0,
        stop_step=2**20,
    )


class Arm(NamedTuple):
    """A pipeline, its settings, and the cores that it runs on."""

    name: str
    open: Callable[..., Batches]
    cores: int
    settings: dict[str, Any]


_BILINEAR, _BICUBIC = ({"method": m, "antialias": a} for m, a in (("bilinear", False), ("bicubic", True)))
ARMS = (
    Arm("ours", ours, 1, {"workers": 0, "threads": 1}),
    Arm("open_clip", data_peers.open_clip, 1, {"workers": 0}),
    Arm("open_clip", data_peers.open_clip, 1, {"workers": 1}),
    Arm("webdataset", data_peers.webdataset, 1, {"workers": 0}),
    Arm("webdataset", data_peers.webdataset, 1, {"workers": 1}),
    Arm("tf_data", data_peers.tf_data, 1, {"cores": 1, **_BILINEAR}),
    Arm("tf_data_bicubic", data_peers.tf_data, 1, {"cores": 1, **_BICUBIC}),
    Arm("ours", ours, 2, {"workers": 0, "threads": 2}),
    Arm("ours", ours, 2, {"workers": 2, "threads": 1}),
    Arm("open_clip", data_peers.open_clip, 2, {"workers": 1}),
    Arm("open_clip", data_peers.open_clip, 2, {"workers": 2}),
    Arm("webdataset", data_peers.webdataset, 2, {"workers": 1}),
    Arm("webdataset", data_peers.webdataset, 2, {"workers": 2}),
    Arm("tf_data", data_peers.tf_data, 2, {"cores": 2, **_BILINEAR}),
    Arm("tf_data_bicubic", data_peers.tf_data, 2, {"cores": 2, **_BICUBIC}),
)
MODULES = {
    ours: ("grain", "simplejpeg", "cv2"),
    data_peers.open_clip: ("open_clip", "webdataset", "torch", "torchvision", "PIL"),
    data_peers.webdataset: ("webdataset", "torch", "torchvision", "PIL"),
    data_peers.tf_data: ("tensorflow",),
}
"""Whose versions matter."""


class Effort(NamedTuple):
    """How much to measure."""

    samples: int
    """Pictures of each set."""
    warm_up: int
    """Batches before the clock starts."""
    seconds: float
    """Shortest time of one measurement."""
    repeats: int


def measure(arm: Arm, shards: ShardSet, effort: Effort) -> dict[str, float]:
    """One measurement of an arm, in a process that is pinned already."""
    with contextlib.closing(arm.open(shards, **arm.settings)) as batches:
        for _ in range(effort.warm_up):
            batch = next(batches)
        assert sorted(batch["image"].shape) == sorted((BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3)), batch["image"].shape
        assert batch["text"].size == BATCH_SIZE * TEXT_LENGTH, batch["text"].shape
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        cpu_begun, begun, images = _cpu_seconds(processes), time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begun) < effort.seconds:
            # Two, because two workers or threads that keep step deliver their batches in pairs.
            images += len(next(batches)["image"]) + len(next(batches)["image"])
        return {
            "images_per_s": images / elapsed,
            "cpu_s_per_1000_images": (_cpu_seconds(processes) - cpu_begun) / images * 1000,
            "batch_mb": sum(column.nbytes for column in batch.values()) / 1e6,
            "peak_rss_mib": sum(_peak_rss_kib(process.pid) for process in processes) / 2**10,
            "pss_mib": sum(process.memory_full_info().pss for process in processes) / 2**20,
        }


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def _peak_rss_kib(pid: int) -> int:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0])


def measure_apart(arm: Arm, shards: ShardSet, effort: Effort) -> dict[str, float]:
    """:func:`measure` in a fresh process, pinned to the last of the cores allowed, with the files in the page cache."""
    for file in shards.path.glob("*.t*"):  # Tars and TFRecords.
        file.read_bytes()
    cores = sorted(os.sched_getaffinity(0))[-arm.cores :]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_prepare, initargs=(cores,)) as pool:
        return pool.submit(measure, arm, shards, effort).result()


def _prepare(cores: list[int]) -> None:
    os.sched_setaffinity(0, cores)
    # A spawned process would spawn its own too, while torch's loaders fork their workers on Linux.
    multiprocessing.set_start_method("fork", force=True)


def results(arms: list[Arm], sets: list[ShardSet], effort: Effort) -> Iterator[dict[str, Any]]:
    """A line for each arm and set: medians over the repetitions, and the range of the speed."""
    measured: dict[tuple[int, int], list[dict[str, float]]] = {}
    skipped: dict[int, str] = {}
    for _ in range(effort.repeats):
        for s, shards in enumerate(sets):
            for a, arm in enumerate(arms):
                if a in skipped:
                    continue
                try:
                    result = measure_apart(arm, shards, effort)
                except ImportError as error:
                    skipped[a] = str(error)
                    continue
                measured.setdefault((s, a), []).append(result)
                speed = f"{result['images_per_s']:.1f} images/s on {arm.cores} cores"
                print(f"{shards.path.name} {arm.name} {arm.settings}: {speed}", file=sys.stderr)
    distributions = importlib.metadata.packages_distributions()
    for s, shards in enumerate(sets):
        for a, arm in enumerate(arms):
            line = {"arm": arm.name, "cores": arm.cores, **arm.settings}
            if a in skipped:
                yield {**line, "skipped": skipped[a]}
                continue
            runs = measured[s, a]
            medians = {name: round(float(np.median([result[name] for result in runs])), 2) for name in runs[0]}
            speeds = [result["images_per_s"] for result in runs]
            yield {
                **line,
                "pictures": shards.path.name,
                "mean_jpeg_bytes": shards.mean_jpeg_bytes,
                **medians,
                "images_per_s_range": [round(min(speeds), 2), round(max(speeds), 2)],
                "images_per_s_per_core": round(medians["images_per_s"] / arm.cores, 2),
                "repeats": effort.repeats,
                "seconds": effort.seconds,
                "versions": {
                    package: importlib.metadata.version(package)
                    for module in MODULES[arm.open]
                    for package in distributions[module]
                },
            }


def table(lines: list[dict[str, Any]]) -> str:
    names = ("images_per_s", "images_per_s_per_core", "cpu_s_per_1000_images", "batch_mb", "peak_rss_mib", "pss_mib")
    rows: list[tuple[str, ...]] = [("pictures", "arm", "settings", "cores", "range", *names)]
    for line in lines:
        settings = " ".join(f"{name}={line[name]}" for name in ("workers", "threads") if name in line)
        if "skipped" in line:
            rows.append(("", line["arm"], settings, str(line["cores"]), f"left out: {line['skipped']}"))
            continue
        speeds = "{:.0f} .. {:.0f}".format(*line["images_per_s_range"])
        values = (f"{line[name]:.1f}" for name in names)
        rows.append((line["pictures"], line["arm"], settings, str(line["cores"]), speeds, *values))
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return "\n".join("  ".join(map(str.ljust, row, widths)) for row in rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path(tempfile.gettempdir()) / "llip_jax_benchmark")
    names = list(dict.fromkeys(arm.name for arm in ARMS))
    parser.add_argument("--arms", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="file that lines are added to, besides stdout")
    args = parser.parse_args(argv)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    allowed = len(os.sched_getaffinity(0))
    arms = [arm for arm in ARMS if arm.name in args.arms and arm.cores <= allowed]
    if args.quick:
        arms = list({arm.open: arm for arm in arms}.values())
        effort = Effort(samples=256, warm_up=2, seconds=1, repeats=1)
        sets = [shard_set(args.shards, 256, effort.samples)]
    else:
        effort = Effort(samples=3072, warm_up=16, seconds=args.seconds, repeats=args.repeats)
        sets = [shard_set(args.shards, pixels, effort.samples) for pixels in (256, 640)]
    machine = {
        "device": re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0],
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/data.py", *argv]),
    }
    lines = [{**line, **machine} for line in results(arms, sets, effort)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    print(text, end="")
    if args.out:
        with args.out.open("a") as stream:
            stream.write(text)
    print(table(lines), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
