"""Draws docs/pair_scores_memory.png from the lines of ``python benchmarks/pair_scores.py --memory``.

    python benchmarks/plot_pair_scores.py benchmarks/results/pair_scores_memory.jsonl docs/pair_scores_memory.png

Needs matplotlib (extra ``report``).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    ("streamed", True): ("Llip, streamed (ours)", "#1b6ca8", "o-"),
    ("gather", True): ("Llip, streamed, texts gathered (ours)", "#6aaed6", "s-"),
    ("dense", True): ("Llip, dense", "#c44e52", "^-"),
    ("torch_attention", True): ("torch attention over all pairs", "#dd8452", "D--"),
    ("open_clip", False): ("SigLIP, open_clip's loss", "#8c6bb1", "v--"),
    ("streamed", False): ("SigLIP, streamed (ours)", "#55a868", "P-"),
}
"""By implementation and whether images are mixed."""


def mebibytes(line: dict[str, Any]) -> float:
    return line.get("temporaries_mib", line.get("kept_for_backward_mib"))


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True, sharey=True)
    for panel, curve, axis, label in (
        (panels[0], "texts", "j", "texts"),
        (panels[1], "devices", "devices", "devices"),
    ):
        own = [line for line in lines if line["curve"] == curve]
        for (implementation, mixed), (name, colour, style) in STYLES.items():
            points = sorted(
                (line[axis], mebibytes(line))
                for line in own
                if line["implementation"] == implementation and (line["k"] > 0) == mixed
            )
            if points:
                panel.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=5)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        ticks = sorted({line[axis] for line in own})
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30 if axis == "j" else 0)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
    mixed = next(line for line in lines if line["k"] > 0 and line["curve"] == "texts")
    shape = f"K = {mixed['k']}, M = {mixed['m']}, d = {mixed['d']}"
    panels[0].set_title(f"{mixed['n']} images against more and more texts ({shape})", fontsize=10)
    panels[1].set_title(f"{mixed['n']} images and texts on each device ({shape})", fontsize=10)
    panels[0].set_ylabel("MiB on a device: temporaries, or what torch\nkeeps for the backward pass (float32)")
    panels[0].set_ylim(top=10 * max(map(mebibytes, lines)))  # room for the legend
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panels[0].legend(fontsize=8, loc="upper left")
    panels[1].legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw([json.loads(line) for line in args.lines.read_text().splitlines()], args.picture)


if __name__ == "__main__":
    main()
