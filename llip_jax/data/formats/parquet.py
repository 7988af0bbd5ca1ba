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
_LARGE_ROW_GROUP = 16 * 2**20

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
        ConfigError: a file that is not Parquet.
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
            columns = self._table(group).slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise BadSample("caption_not_utf8", f"{name}: {error}") from error
        except (pa.ArrowException, OSError) as error:
            raise BadSample("unreadable", f"{name}: {error}") from error
        return name, columns

    def identity(self) -> Mapping[str, str]:
        """See :class:`llip_jax.data.records.Source`."""
        return self._identity

    def _table(self, group: int) -> pa.Table:
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
        file, number = self._groups[group]
        with self._open(self._files[file]) as stream:
            table = pq.ParquetFile(stream).read_row_group(number, use_threads=False)
        with self._lock:
            self._kept[group] = table
            while len(self._kept) > _ROW_GROUPS_KEPT:
                self._kept.popitem(last=False)
        return table

    def _open(self, file: StoredFile) -> Any:
        storage, path = filesystem(file.url, self._field)
        return storage.open(path, "rb")

    def _footer(self, file: StoredFile) -> pq.FileMetaData:
        try:
            with self._open(file) as stream:
                return pq.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{self._field}: {file.url} is not a Parquet file that can be read ({error})") from error


def _digest(file: StoredFile) -> str:
    """Of the end of the file, which holds the places and statistics of all columns."""
    length = min(file.size, 2**16)
    return hashlib.sha256(read_range(file, file.size - length, length)).hexdigest()[:16]
