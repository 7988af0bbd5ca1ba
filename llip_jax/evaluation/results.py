"""Evaluation figures as a table for people."""

from collections.abc import Mapping
from typing import Any


def summary(results: Mapping[str, Any]) -> str:
    """One line a figure that has a chance level, with how many times chance it is."""
    counts = [f"{results['images']} images", f"{results['texts']} captions"]
    if "classes" in results:
        counts.append(f"{results['classes']} classes")
    if results["unreadable_images"]:
        counts.append(f"{results['unreadable_images']} unreadable images left out")
    lines = [f"evaluation after {results['step']} steps: {', '.join(counts)}"]
    lines.append(f"  {'':<34} {'value':>8} {'chance':>8}  times chance")
    for task in ("zero_shot", "retrieval"):
        for name, value in results.get(task, {}).items():
            chance = results[task].get(f"{name}_chance")
            if chance is not None:
                label = f"{task} {name}".replace("_", " ").replace("retrieval ", "")
                lines.append(f"  {label:<34} {value:8.2%} {chance:8.2%}  {value / chance:.1f}")
    return "\n".join(lines)
