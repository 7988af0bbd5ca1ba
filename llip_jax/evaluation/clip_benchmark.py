"""Results as CLIP_benchmark writes them, so that ``clip_benchmark build`` puts ours beside others'.

https://github.com/LAION-AI/CLIP_benchmark, version 1.6: a JSON document for each data set and task.
"""

import re
from collections.abc import Mapping
from typing import Any

_DIRECTIONS = {"image_retrieval": "text_to_image", "text_retrieval": "image_to_text"}  # theirs name what is looked for
_CLASSIFICATION = {"acc1": "top_1_accuracy", "acc5": "top_5_accuracy", "mean_per_class_recall": "mean_per_class_recall"}
_METRICS = {
    "zeroshot_classification": _CLASSIFICATION | {"mean_average_precision": "mean_average_precision"},
    "zeroshot_retrieval": {
        f"{theirs}_recall@{k}": f"{ours}_recall_at_{k}" for theirs, ours in _DIRECTIONS.items() for k in (1, 5, 10)
    },
    "image_caption_selection": {"text_acc": "accuracy", "acc": "accuracy"},
}
"""By task: our figure for each of their metrics."""


def documents(results: Mapping[str, Any], dataset: str, model: str, pretrained: str) -> dict[str, dict[str, Any]]:
    """CLIP_benchmark's documents by file name, one for each task that ``results`` has figures of.

    Classification is that of the averaged texts (scorer ``mean_text``). Linear probes are not among them: ours learn
    from fewer images, standardized, with other regularizations. Three things differ from what CLIP_benchmark would have
    computed: equal scores count by chance, ``acc5`` is left out where there are fewer than five classes (theirs is
    NaN), and a caption of several images is one query that any of them answers (theirs asks once for each, with one
    right answer).

    Args:
        results: figures of one set.
        dataset: its name, such as ``wds/flickr30k``.
        model: name of the model.
        pretrained: name of its weights.
    """
    sources = {
        "zeroshot_classification": results.get("zero_shot", {}),
        "zeroshot_retrieval": results.get("retrieval", {}),
        "image_caption_selection": results.get("choice", {}),
    }
    written = {}
    for task, figures in sources.items():
        metrics = {theirs: figures[ours] for theirs, ours in _METRICS[task].items() if ours in figures}
        if not metrics:
            continue
        if results.get("classes", 0) < 5:
            metrics = {name: value for name, value in metrics.items() if not name.endswith("acc5")}
        if task == "image_caption_selection":
            metrics["image_acc"] = 1.0  # the right image for the true caption, where there is one image
        document = {"dataset": dataset, "model": model, "pretrained": pretrained, "task": task, "metrics": metrics}
        name = "_".join([dataset.removeprefix("wds/"), pretrained, model, "en", task])
        written[f"{_safe(name)}.json"] = document | {"language": "en"}
    return written


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).lstrip(".-")
