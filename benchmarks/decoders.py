"""Milliseconds that decoders and resizers take for a picture on a core: why pictures are decoded as they are.

    taskset -c 1 python benchmarks/decoders.py [--shards DIR]

Pictures are those of benchmarks/data.py. Each figure is the least of ten rounds over the same 64 pictures, in turn.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from data_shards import shard_set
from PIL import Image

from llip_jax.data.images import shrink

SIZE, PICTURES, ROUNDS = 224, 64, 10


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pillow_reduced(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (SIZE, SIZE))
    return np.asarray(image)


DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "simplejpeg": simplejpeg.decode_jpeg,
    "simplejpeg, reduced": lambda data: simplejpeg.decode_jpeg(data, min_height=SIZE, min_width=SIZE, min_factor=2),
    "opencv": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
    "pillow": pillow,
    "pillow, reduced": pillow_reduced,
}
RESIZERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "shrink": lambda image: shrink(image, SIZE),
    "pillow bicubic": lambda image: np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)),
    "opencv area": lambda image: cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA),
}


def least_ms(functions: dict[str, Callable], items: list) -> dict[str, float]:
    least = dict.fromkeys(functions, float("inf"))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            begun = time.perf_counter()
            for item in items:
                function(item)
            least[name] = min(least[name], (time.perf_counter() - begun) / len(items) * 1e3)
    return {name: round(value, 3) for name, value in least.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path(tempfile.gettempdir()) / "llip_jax_benchmark")
    args = parser.parse_args()
    cv2.setNumThreads(0)
    for pixels in (256, 640):
        with tarfile.open(shard_set(args.shards, pixels, 256).files[0]) as archive:
            members = [member for member in archive if member.name.endswith(".jpg")][:PICTURES]
            data = [archive.extractfile(member).read() for member in members]
        images = [pillow(picture) for picture in data]
        line = {"pixels": pixels, "decode_ms": least_ms(DECODERS, data), "resize_ms": least_ms(RESIZERS, images)}
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
