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
    lines.append(f"  {'':<36} {'value':>8} {'chance':>8}  times chance")
    for task in ("zero_shot", "retrieval", "two_stage"):
        for name, value in results.get(task, {}).items():
            chance = results[task].get(f"{name}_chance")
            if chance is not None:
                label = f"{task} {name}".replace("_", " ").replace("retrieval ", "")
                lines.append(f"  {label:<36} {value:8.2%} {chance:8.2%}  {value / chance:.1f}")
    if two_stage := results.get("two_stage"):
        lines.append(
            f"  two stage: {two_stage['rescored_share']:.2%} of all pairs rescored, on shortlists of "
            f"{two_stage['shortlist']} by image embeddings that no text has conditioned"
        )
        for direction in ("image_to_text", "text_to_image"):
            lines.append(
                f"  of the exact result, {direction.replace('_', ' ')}: best answer in the shortlist for "
                f"{two_stage[f'{direction}_best_in_shortlist']:.2%}, "
                f"{two_stage[f'{direction}_top_10_overlap']:.2%} of the top 10 kept"
            )
    return "\n".join(lines)
