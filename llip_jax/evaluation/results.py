"""Evaluation figures as a table for people."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class _Row(NamedTuple):
    label: str
    value: float
    interval: tuple[float, float] | None
    chance: float | None


def summary(results: Mapping[str, Any]) -> str:
    """One line a figure, with its interval, chance level and how many times chance it is; further sets below."""
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
    lines += _left_out(results)
    for name, own in results.get("sets", {}).items():
        lines += [f"{name}: {_counts(own)}", *_table(own), *_left_out(own)]
    for name, group in results.get("robustness", {}).items():
        lines.append(
            f"{name} ({', '.join(group['members'])}): mean top 1 accuracy {group['top_1_accuracy_mean']:.2%}, worst "
            f"{group['top_1_accuracy_worst']:.2%} ({group['worst_member']})"
        )
    return "\n".join(lines)


def _counts(results: Mapping[str, Any]) -> str:
    counts = [f"{results['images']} images"]
    if "texts" in results:
        counts.append(f"{results['texts']} captions")
    if "classes" in results:
        counts.append(f"{results['classes']} classes")
    if results["unreadable_images"]:
        counts.append(f"{results['unreadable_images']} unreadable images left out")
    return ", ".join(counts)


def _left_out(results: Mapping[str, Any]) -> Iterator[str]:
    for task, reason in results.get("left_out", {}).items():
        yield f"  left out: {task.replace('_', ' ')}: {reason}"


def _table(results: Mapping[str, Any]) -> Iterator[str]:
    rows = [row for task, own in results.items() if isinstance(own, Mapping) for row in _rows(task, own)]
    if not rows:
        return
    width = max([36, *(len(row.label) for row in rows)])
    intervals = any(row.interval for row in rows)

    def line(label: str, value: str, between: str, chance: str, times: str) -> str:
        return f"  {label:<{width}} {value:>8} {f'{between:>18} ' * intervals}{chance:>8}  {times}".rstrip()

    yield line("", "value", "95 % interval", "chance", "times chance")
    for label, value, interval, chance in rows:
        between = f"{interval[0]:.2%} to {interval[1]:.2%}" if interval else ""
        if chance is None:
            yield line(label, f"{value:.1f}", between, "", "")
        else:
            yield line(label, f"{value:.2%}", between, f"{chance:.2%}", f"{value / chance:.1f}" if chance else "")


def _rows(task: str, figures: Mapping[str, Any]) -> Iterator[_Row]:
    """Figures of a task that have a chance level, median ranks, and those of its parts (embeddings)."""
    for name, value in figures.items():
        label = f"{task} {name}".replace("_", " ").replace("retrieval ", "")
        if isinstance(value, Mapping) and task in ("knn", "linear_probe"):
            yield from _rows(f"{task} {name}", value)
        elif f"{name}_chance" in figures:
            yield _Row(label, value, figures.get(f"{name}_interval"), figures[f"{name}_chance"])
        elif name.endswith("median_rank"):
            yield _Row(label, value, None, None)
