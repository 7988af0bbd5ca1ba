"""TensorFlow Datasets, read through ``tfds.data_source``: random access, without TensorFlow."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llip_jax.config import ConfigError, nearest
from llip_jax.data.records import BadSample


class TfdsRows:
    """Rows of a prepared data set; encoded images stay encoded.

    Args:
        name: as in ``tfds.load`` ("coco_captions:1.1.0"), or the folder of a prepared version.
        split: as in ``tfds.load`` ("train", "train[:10%]").
        data_dir: where prepared data sets lie; None: TensorFlow Datasets' default.
        images: features that hold images, by name; those that the data set does not have are passed over.
        field: what the configuration calls ``name``.

    Raises:
        ConfigError: no such data set, version or split, or it is not prepared as ArrayRecord.
    """

    def __init__(self, name: str, split: str, data_dir: str | None, images: Sequence[str], field: str):
        self._name, self._split, self._data_dir, self._field = name, split, data_dir, field
        self._images = tuple(images)
        self._source: Any = self._open()
        info = self._source.dataset_info
        description = {
            "features": info.features.to_json(),
            "splits": [(info.splits[name].shard_lengths, info.splits[name].num_bytes) for name in self._splits()],
        }
        digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
        self._identity = {f"{info.full_name} {split}": f"{len(self._source)} samples, {digest}"}
        self._size = len(self._source)

    def _open(self) -> Any:
        # Here, not above: it takes a second and is needed by this format only.
        import tensorflow_datasets as tfds

        where = f"{self._field}: {self._name!r}"
        try:
            if (Path(self._name) / "dataset_info.json").is_file():
                builder = tfds.builder_from_directory(self._name)
            else:
                # From its files: the code that made a data set may want TensorFlow.
                builder = tfds.core.read_only_builder.builder_from_files(
                    self._name.partition(":")[0], version=self._name.partition(":")[2] or None, data_dir=self._data_dir
                )
            for split in self._splits():
                if split not in builder.info.splits:
                    raise ConfigError(f"{where} has no split {split!r}.{nearest(split, list(builder.info.splits))}")
            skip = {
                name: tfds.decode.SkipDecoding()
                for name, feature in builder.info.features.items()
                if name in self._images and isinstance(feature, tfds.features.Image)
            }
            return builder.as_data_source(self._split, decoders=skip or None)
        except NotImplementedError as error:
            raise ConfigError(
                f"{where} is stored as {builder.info.file_format}, which has no random access; expected ArrayRecord: "
                f"tfds build {self._name} --file_format=array_record"
            ) from error
        except ConfigError:
            raise
        except tfds.core.registered.DatasetNotFoundError as error:
            name, known = self._name.partition(":")[0], tfds.list_builders(with_community_datasets=False)
            folder = self._data_dir or "TensorFlow Datasets' folder (see data.tfds.data_dir)"
            if self._data_dir is not None and not Path(self._data_dir).is_dir():
                raise ConfigError(f"data.tfds.data_dir: there is no folder {self._data_dir!r}") from error
            if name not in known:
                known += [path.name for path in Path(self._data_dir).iterdir()] if self._data_dir else []
                raise ConfigError(
                    f"{where} is not in {folder}, nor is there code for it.{nearest(name, known)}"
                ) from error
            raise ConfigError(
                f"{where} is not prepared in {folder}. Once, with tensorflow installed (it is not needed afterwards): "
                f"tfds build {self._name} --file_format=array_record"
                + (f" --data_dir={self._data_dir}" if self._data_dir else "")
            ) from error
        except Exception as error:  # Its builders raise nearly any type.
            raise ConfigError(f"{where}, split {self._split!r}: {error}") from error

    def _splits(self) -> list[str]:
        """Names of the whole splits in "train[:10%]+validation"."""
        return [part.partition("[")[0].strip() for part in self._split.split("+")]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._source = self._open()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[str, Mapping[str, Any]]:
        """See :class:`llip_jax.data.records.Rows`."""
        name = f"{self._name}/{self._split}/{index}"
        try:
            return name, self._source[index]
        except OSError:
            raise
        except Exception as error:  # Damaged records raise nearly any type.
            raise BadSample("unreadable", f"{name}: {error}") from error

    def identity(self) -> Mapping[str, str]:
        """See :class:`llip_jax.data.records.Source`."""
        return self._identity
