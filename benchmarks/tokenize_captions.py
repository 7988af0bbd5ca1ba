"""Captions a second of the CLIP tokenizer on one core, against open_clip's on the same captions.

    taskset -c 0 python benchmarks/tokenize_captions.py --captions FILE [--batch 256] [--repeats 7]

FILE holds one caption a line. Prints a JSON line for each implementation: median microseconds a caption (cleaning,
encoding and packing to 77 tokens) and the median of the ratios to open_clip in the same turn. Implementations take
turns (A B C A B C) in one process, so that a machine whose speed drifts favours none. All have seen the captions
before.

    instant-clip-tokenizer, vocabulary-file    ClipTokenizer with either source of the vocabulary
    open_clip                                  its tokenizer.py, loaded by itself
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from llip_jax.command_line import run
from llip_jax.config import ConfigError
from llip_jax.data.tokenizers import ClipTokenizer

LENGTH = 77


def open_clip_tokenizer() -> Any:
    """open_clip's tokenizer without the rest of its package."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ConfigError("open_clip_torch is not installed")
    file = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def implementations() -> dict[str, Callable[[list[str]], np.ndarray]]:
    """Texts to tokens, by name."""
    instant = ClipTokenizer()
    with mock.patch.dict(sys.modules, {"instant_clip_tokenizer": None}):
        from_file = ClipTokenizer()
    open_clip = open_clip_tokenizer()
    return {
        "open_clip": lambda texts: open_clip(texts, LENGTH).numpy(),
        "instant-clip-tokenizer": lambda texts: instant.encode(texts, LENGTH)[0],
        "vocabulary-file": lambda texts: from_file.encode(texts, LENGTH)[0],
    }


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args(words)
    captions = arguments.captions.read_text(encoding="utf-8").splitlines()
    batches = [captions[start : start + arguments.batch] for start in range(0, len(captions), arguments.batch)]

    encoders = implementations()
    expected = [encoders["open_clip"](batch) for batch in batches]
    for encode in encoders.values():
        for batch, tokens in zip(batches, expected, strict=True):
            np.testing.assert_array_equal(encode(batch), tokens)

    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(arguments.repeats):
        for name, encode in encoders.items():
            started = time.perf_counter()
            for batch in batches:
                encode(batch)
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds["open_clip"], times, strict=True)]
        line = {
            "tokenizer": name,
            "captions": len(captions),
            "batch": arguments.batch,
            "characters_a_caption": round(statistics.mean(map(len, captions)), 1),
            "ascii_share": round(statistics.mean(caption.isascii() for caption in captions), 3),
            "microseconds_a_caption": round(1e6 * statistics.median(times) / len(captions), 2),
            "times_open_clip": round(statistics.median(ratios), 2),
            "times_open_clip_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
