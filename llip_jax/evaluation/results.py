"""Evaluation figures as a table for people."""

from collections.abc import Iterator, Mapping
from typing import Any


def summary(results: Mapping[str, Any]) -> str:
    """One line a figure that has a chance level, with how many times chance it is; further sets below."""
    lines = [f"evaluation after {results['step']} steps: {_counts(results)}", *_table(results)]
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
    for name, own in results.get("sets", {}).items():
        lines += [f"{name}: {_counts(own)}", *_table(own)]
    for name, group in results.get("robustness", {}).items():
        lines.append(
            f"{name} ({', '.join(group['members'])}): mean top 1 accuracy {group['top_1_accuracy_mean']:.2%}, worst "
            f"{group['top_1_accuracy_worst']:.2%} ({group['worst_member']})"
        )
    for task, reason in results.get("left_out", {}).items():
        lines.append(f"  left out: {task.replace('_', ' ')}: {reason}")
    return "\n".join(lines)


def _counts(results: Mapping[str, Any]) -> str:
    counts = [f"{results['images']} images", f"{results['texts']} captions"]
    if "classes" in results:
        counts.append(f"{results['classes']} classes")
    if results["unreadable_images"]:
        counts.append(f"{results['unreadable_images']} unreadable images left out")
    return ", ".join(counts)


def _table(results: Mapping[str, Any]) -> Iterator[str]:
    figures = [(task, values) for task, values in results.items() if isinstance(values, Mapping)]
    rows = [row for task, values in figures for row in _rows(task, values)]
    width = max([36, *(len(label) for label, *_ in rows)])
    if rows:
        yield f"  {'':<{width}} {'value':>8} {'chance':>8}  times chance"
    for label, value, chance in rows:
        yield f"  {label:<{width}} {value:8.2%} {chance:8.2%}  {value / chance:.1f}"


def _rows(task: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Label, value and chance level of a task's figures, and of those of its parts (embeddings)."""
    for name, value in figures.items():
        if isinstance(value, Mapping) and task in ("knn", "linear_probe"):
            yield from _rows(f"{task} {name}", value)
        elif f"{name}_chance" in figures:
            label = f"{task} {name}".replace("_", " ").replace("retrieval ", "")
            yield label, value, figures[f"{name}_chance"]
