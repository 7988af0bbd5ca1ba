"""From the start of a process to the first scores, and the memory of scoring many pictures, on random weights.

    python benchmarks/inference.py first --size B/32 --runs 5
    python benchmarks/inference.py memory --size Ti/4 --pictures 100 1000

Weights are written as ``save_pretrained`` does, to a temporary folder, and read in a process of its own; the files were
just written, so reading them does not wait for a disk. Prints one JSON line a run, and for ``first`` the least of all.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

_FIRST = """
import resource, time
clock = [time.monotonic()]
import llip_jax
import llip_jax.inference
clock.append(time.monotonic())
model = llip_jax.load({folder!r})
clock.append(time.monotonic())
import numpy as np
pictures = np.random.default_rng(0).integers(256, size=({pictures}, 300, 400, 3), dtype=np.uint8)
texts = [f"a picture of {{n}} dogs" for n in range({texts})]
scores = model.score(pictures, texts)
clock.append(time.monotonic())
used = resource.getrusage(resource.RUSAGE_SELF)
cpu_s = used.ru_utime + used.ru_stime
model.score(pictures, texts)
clock.append(time.monotonic())
assert np.isfinite(scores).all() and scores.shape == ({pictures}, {texts})
stages = dict(zip(("imports_s", "load_s", "first_scores_s", "next_scores_s"), np.diff(clock).round(2).tolist()))
report = {{"first_answer_at": clock[3], "cpu_s": round(cpu_s, 2), **stages, "peak_mib": used.ru_maxrss // 1024}}
"""

_MEMORY = """
import resource
import numpy as np
import llip_jax
model = llip_jax.load({folder!r})
rng = np.random.default_rng(0)
def pictures(count):
    return (rng.integers(256, size=(300, 400, 3), dtype=np.uint8) for _ in range(count))
texts = [f"a picture of {{n}} dogs" for n in range({texts})]
model.score(pictures(64), texts)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
scores = model.score(pictures({pictures}), texts)
report = {{"peak_mib_after_64": before, "peak_mib": peak(), "results_mib": round(scores.nbytes / 2**20, 2)}}
"""


def write_weights(size: str, tokens: int, folder: Path) -> None:
    """A Llip of this size with noise for parameters."""
    import numpy as np
    from flax import traverse_util

    from llip_jax.config import resolve, to_dict
    from llip_jax.interop import maps, pretrained
    from llip_jax.interop.weights import Weights, sections

    raw: dict[str, Any] = {"model": {"size": size, "mixture_tokens": tokens}}
    if size == "Ti/4":
        raw["model"]["image_size"] = 32
    config, rng = resolve(raw), np.random.default_rng(0)
    flat = {
        path: 0.03 * rng.standard_normal(shape, np.float32) + path.endswith("scale")
        for path, shape in maps.parameter_shapes(config).items()
    }
    pretrained.write(Weights(sections(to_dict(config)), traverse_util.unflatten_dict(flat, sep="/")), folder)


def ask(program: str, **fields: Any) -> dict[str, Any]:
    """What a program reports, run by a Python of its own; ``first_answer_s`` from before that started."""
    code = program.format(**fields) + "\nimport json\nprint(json.dumps(report))"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    report = json.loads(done.stdout.splitlines()[-1])
    if "first_answer_at" in report:
        report = {"first_answer_s": round(report.pop("first_answer_at") - begun, 2), **report}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("first", "memory"))
    parser.add_argument("--size", default="B/32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pictures", type=int, nargs="+", default=[4])
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3, help="of `first`")
    args = parser.parse_args()
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "jax": version("jax"),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "weights"
        write_weights(args.size, args.tokens, folder)
        for pictures in args.pictures:
            about = {
                "what": args.what,
                "size": args.size,
                "tokens": args.tokens,
                "pictures": pictures,
                "texts": args.texts,
            }
            fields = {"folder": str(folder), "pictures": pictures, "texts": args.texts}
            if args.what == "memory":
                print(json.dumps(about | machine | ask(_MEMORY, **fields)), flush=True)
                continue
            runs = []
            for _ in range(args.runs):
                runs.append(ask(_FIRST, **fields))
                print(json.dumps(about | machine | runs[-1]), flush=True)
            least = {name: min(run[name] for run in runs) for name in runs[0]}
            print(json.dumps(about | machine | {"least_of": args.runs} | least), flush=True)


if __name__ == "__main__":
    main()
