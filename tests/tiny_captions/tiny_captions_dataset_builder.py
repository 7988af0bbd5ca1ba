"""Pictures with captions, laid out as tfds' coco_captions."""

import io
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
    """Laid out as tfds' coco_captions."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, rows: tuple[Any, ...], **options: Any):
        self._rows = rows
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
            "label": tfds.features.ClassLabel(num_classes=5),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(self._rows), "validation": self._generate_examples(self._rows[:7])}

    def _generate_examples(self, chosen: tuple[Any, ...]) -> Any:
        for sample in chosen:
            captions = [{"id": number, "text": text} for number, text in enumerate(sample.captions)]
            yield sample.key, {"image": io.BytesIO(sample.image), "captions": captions, "label": sample.label}
