"""Parquet files with encoded images in a column (Hugging Face's and img2dataset's layouts), through pyarrow."""

import hashlib
import logging
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llip_jax.config import ConfigError
from llip_jax.data.files import StoredFile, filesystem, read_range, unique_names
from llip_jax.data.records import BadSample

_ROW_GROUPS_KEPT = 4
_LARGE_ROW_GROUP, _LARGEST_ROW_GROUP = 16 * 2**20, 2**30

_logger = logging.getLogger(__name__)


class ParquetRows:
    """Rows of Parquet files.

    Parquet is read a row group at a time: a sample costs its whole row group, of which the last few are kept. With
    shuffled order that is rarely the one wanted, so large row groups are told; ``launch/prepare_data.py`` makes shards
    that read by sample.

    Args:
        files: the files, in order.
        field: what the configuration calls them.

    Raises:
        ConfigError: a file that is not Parquet, or has row groups too large to be read.
    """

    def __init__(self, files: Sequence[StoredFile], field: str):
        self._files, self._field = tuple(files), field
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(self._footer, self._files))
        groups = [
            (file, group, footer.row_group(group))
            for file, footer in enumerate(footers)
            for group in range(footer.num_row_groups)
        ]
        self._groups = tuple((file, group) for file, group, _ in groups)
        self._starts = np.cumsum([0, *(meta.num_rows for *_, meta in groups)]).tolist()
        self._identity = {
            name: f"{footer.num_rows} rows, {file.size} bytes, {_digest(file)}"
            for name, file, footer in zip(unique_names(self._files), self._files, footers, strict=True)
        }
        largest = max((meta.total_byte_size for *_, meta in groups), default=0)
        if largest > _LARGEST_ROW_GROUP:
            raise ConfigError(
                f"{field}: a row group of {largest / 2**30:.1f} GiB, which every sample would read whole; expected at "
                f"most {_LARGEST_ROW_GROUP / 2**30:.0f} GiB. Rewrite the files with fewer rows in each group"
            )
        if largest > _LARGE_ROW_GROUP:
            _logger.warning(
                "Parquet row groups of up to %d MiB: every sample reads a whole one. Rewrite them with few rows each, "
                "or make shards with launch/prepare_data.py",
                largest // 2**20,
            )
        self._prepare()

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> tuple[str, Mapping[str, Any]]:
        """See :class:`llip_jax.data.records.Rows`."""
        group = bisect_right(self._starts, index) - 1
        row = index - self._starts[group]
        file = self._files[self._groups[group][0]]
        name = f"{file.name}/{index}"
        try:
            table = self._table(group)
        except pa.ArrowException as error:  # OSError passes: it may be the storage's, and pass.
            raise BadSample("unreadable", f"{name}: {error}") from error
        return name, {column: _value(table[column][row]) for column in table.column_names}

    def identity(self) -> Mapping[str, str]:
        """See :class:`llip_jax.data.records.Source`."""
        return self._identity

    def _table(self, group: int) -> pa.Table:
        with self._lock:  # also while reading, so that threads do not hold a copy each
            if group not in self._kept:
                file, number = self._groups[group]
                with self._open(self._files[file]) as stream:
                    self._kept[group] = pq.ParquetFile(stream).read_row_group(number, use_threads=False)
                if len(self._kept) > _ROW_GROUPS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]

    def _open(self, file: StoredFile) -> Any:
        storage, path = filesystem(file.url, self._field)
        return storage.open(path, "rb")

    def _footer(self, file: StoredFile) -> pq.FileMetaData:
        try:
            with self._open(file) as stream:
                return pq.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{self._field}: {file.url} is not a Parquet file that can be read ({error})") from error


def _value(scalar: pa.Scalar) -> Any:
    """The value in Python; text that is not UTF-8 as bytes, and None where there is no such value."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        buffer = scalar.as_buffer() if hasattr(scalar, "as_buffer") else None
        return None if buffer is None else buffer.to_pybytes()
    except Exception:  # Dates, durations and time zones out of range raise any type, and are hardly of interest.
        return None


def _digest(file: StoredFile) -> str:
    """Of the end of the file, which holds the places and statistics of all columns."""
    length = min(file.size, 2**16)
    return hashlib.sha256(read_range(file, file.size - length, length)).hexdigest()[:16]
