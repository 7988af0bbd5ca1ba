"""Images in a folder, and a list of them: JSON lines (captions.jsonl), CSV or TSV, one record a line.

Such lists are written by hand or by a script, so everything about them is checked at once and told with its line.
"""

import csv
import hashlib
import json
import logging
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from llip_jax.config import ConfigError, FieldsConfig, FolderConfig, LimitsConfig, nearest
from llip_jax.data.records import BadSample, Record

_USUAL = FieldsConfig(image=("image", "filepath"), captions=("captions", "caption", "title"))
"""Columns of lists whose columns are not named; the second ones are OpenCLIP's."""
_KINDS = "captions from columns"
"""Under this name the stored lines say which column each caption is from, where columns are named by the user."""

_logger = logging.getLogger(__name__)


class FolderSource:
    """The records of one split, in file order. Images are read when a record is; everything else is checked at once.

    The split of a record is its ``config.split_field``. If no record has that field, ``config.eval_fraction`` of
    them are held out for evaluation by a hash of the image path.

    Args:
        path: a folder with captions.jsonl, or a .jsonl, .csv or .tsv file. Image paths in it are relative to its folder
            and must stay inside.
        config: names and meaning of the record fields.
        split: "train" or "eval", which stand for ``config.train_split`` and ``config.eval_split``.
        columns: where images and captions are called something else; each column of captions holds a list of strings
            or a string.
        limits: larger image files are not read.
        field: what the configuration calls ``path``.
        hold_out: whether records without a split are divided; otherwise all of them belong to either split.
        captionless: whether records may lack captions.

    Raises:
        ConfigError: anything about the folder or the list that is not as expected, with file and line.
    """

    def __init__(
        self,
        path: str | Path,
        config: FolderConfig,
        split: Literal["train", "eval"],
        columns: FieldsConfig = FieldsConfig(),
        limits: LimitsConfig = LimitsConfig(),
        *,
        field: str = "data.path",
        hold_out: bool = True,
        captionless: bool = False,
    ):
        file = Path(path)
        if file.suffix not in _LISTS:
            if not file.is_dir():
                raise ConfigError(
                    f"{field}: {str(path)!r} is neither a folder nor a file that ends in {', '.join(_LISTS)}"
                )
            file /= "captions.jsonl"
        if not file.is_file():
            there = (
                [path.name for path in file.parent.glob("*") if path.suffix in _LISTS] if file.parent.is_dir() else []
            )
            raise ConfigError(
                f"{field}: {file} does not exist; expected a list of images."
                + (nearest(file.name, there) if there else "")
            )
        self._root = file.parent
        self._config, self._limits = config, limits

        images = _ImageFiles(self._root)
        exclude = config.eval_exclude if split == "eval" else config.train_exclude
        wanted = config.train_split if split == "train" else config.eval_split
        split_sizes: Counter[str] = Counter()
        field_names: set[str] = set()
        has_split: bool | None = None
        selected: list[str] = []
        digest = hashlib.sha256()
        for where, entry in _LISTS[file.suffix](file):
            entry = _named(entry, columns, where, captionless)
            _check_fields(entry, config, where, captionless)
            size = images.size(entry["image"], where)
            if has_split is None:
                has_split = config.split_field in entry
            divided = has_split or hold_out
            record_split = _split_of(entry, config, has_split, where) if divided else wanted
            split_sizes[record_split] += 1
            field_names.update(entry)
            if record_split == wanted and not any(entry.get(name) in values for name, values in exclude.items()):
                # JSON is kept instead of its parsed form, which would take several times the memory.
                line = json.dumps(entry)
                selected.append(line)
                digest.update(f"{line}\n{size}\n".encode())

        if not split_sizes:
            raise ConfigError(f"{file} is empty; expected one record a line")
        for unknown in sorted(set(exclude) - field_names):
            _logger.warning(
                "data.folder.%s_exclude: no record of %s has a field %r, nothing is excluded", split, file, unknown
            )
        if not selected:
            sizes = ", ".join(f"{name!r} ({count} records)" for name, count in sorted(split_sizes.items()))
            reason = f"data.folder.{split}_exclude leaves out all of" if wanted in split_sizes else "no record is in"
            section = field.removesuffix(".path").removesuffix(".eval_path")
            hint = (
                f"; {section}.folder.{split}_split names another"
                if has_split
                else f". No record has a field {config.split_field!r}, so a hash of the image path decides: add it, "
                f"or raise data.folder.eval_fraction={config.eval_fraction}"
            )
            raise ConfigError(f"{file}: {reason} the {split} split {wanted!r}; splits are {sizes}{hint}")
        self._lines = tuple(selected)
        self._identity = {f"{file.name} {split}": f"{len(selected)} records, {digest.hexdigest()}"}

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        """Reads a record with its image file.

        Raises:
            OSError: the file cannot be read.
            BadSample: the file is larger than ``limits`` allow.
        """
        fields = json.loads(self._lines[index])
        image, captions, kinds = fields.pop("image"), fields.pop("captions"), fields.pop(_KINDS, None)
        with (self._root / image).open("rb") as stream:
            if (size := os.fstat(stream.fileno()).st_size) > self._limits.image_bytes:
                raise BadSample(
                    "image_too_large", f"{image}: file of {size} bytes is larger than {self._limits.image_bytes}"
                )
            data = stream.read()
        duplicate = fields.get(self._config.duplicate_field)
        return Record(
            image=data,
            captions=tuple(captions),
            kinds=("captions",) * len(captions) if kinds is None else tuple(kinds),
            specific=fields.get(self._config.specific_field, len(captions)),
            image_group=f"path:{image}" if duplicate is None else f"duplicate:{duplicate}",
            name=image,
            fields=fields,
        )

    def identity(self) -> Mapping[str, str]:
        """A digest of the selected lines and the sizes of their image files."""
        return self._identity


class _ImageFiles:
    """Finds image files with one listing a directory, and refuses paths that lead out of the folder."""

    def __init__(self, root: Path):
        self._root = root
        self._real_root = Path(os.path.realpath(root))
        self._listings: dict[str, tuple[Path, dict[str, os.DirEntry[str]]]] = {}

    def size(self, image: str, where: str) -> int:
        """Bytes of the file ``image``, a path relative to the folder."""
        path = PurePosixPath(image)
        if path.is_absolute() or ".." in path.parts:
            raise ConfigError(f"{where}: image {image!r} must be a path inside the folder, relative to it")
        directory, entries = self._listing(str(path.parent))
        entry = entries.get(path.name)
        real = Path(os.path.realpath(entry.path)) if entry and entry.is_symlink() else directory
        if not real.is_relative_to(self._real_root):
            raise ConfigError(f"{where}: image {image!r} leads out of the folder through a symbolic link")
        try:
            status = entry.stat() if entry else None
        except OSError:  # a symbolic link to nothing
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{where}: image {image!r} is not a file in {self._root}")
        return status.st_size

    def _listing(self, parent: str) -> tuple[Path, dict[str, os.DirEntry[str]]]:
        if parent not in self._listings:
            try:
                directory = Path(os.path.realpath(self._root / parent))
                with os.scandir(directory) as entries:
                    self._listings[parent] = directory, {entry.name: entry for entry in entries}
            except (OSError, ValueError):  # ValueError: a null character in the path
                self._listings[parent] = self._real_root, {}
        return self._listings[parent]


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    blank = 0
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip():
                blank = number
                continue
            if blank:
                raise ConfigError(f"{file}, line {blank}: blank line between records; expected a JSON object")
            where = f"{file}, line {number}"
            yield where, _parse(raw, where)


def _table(file: Path, separator: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a table whose first line names the columns; an empty cell counts as none."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=separator, strict=True)
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise ConfigError(f"{where}: expected {len(reader.fieldnames or ())} cells, as in the first line")
                entry: dict[str, Any] = {name: value for name, value in row.items() if value.strip()}
                if "captions" in entry:  # a cell holds one
                    entry["captions"] = [entry["captions"]]
                yield where, entry
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 ({error})") from error
    except csv.Error as error:
        raise ConfigError(f"{file}, line {reader.line_num}: {error}") from error


_LISTS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".jsonl": _json_lines,
    ".csv": partial(_table, separator=","),
    ".tsv": partial(_table, separator="\t"),
}


def _named(entry: dict[str, Any], columns: FieldsConfig, where: str, captionless: bool) -> dict[str, Any]:
    """The entry with its image and captions under these names."""
    chosen = bool(columns.image or columns.captions)
    if not chosen and {"image", "captions"} <= entry.keys():
        return entry
    image = next((name for name in columns.image or _USUAL.image if name in entry), None)
    texts = [name for name in columns.captions or _USUAL.captions if name in entry]
    if image is None or not (texts or captionless):
        if not chosen:
            return entry  # What it lacks is told in general terms.
        wanted = " or ".join(map(repr, (columns.image or _USUAL.image) if image is None else columns.captions))
        raise ConfigError(f"{where}: no field {wanted}; there are: {', '.join(entry)}")
    values = {name: entry[name] if isinstance(entry[name], list) else [entry[name]] for name in texts}
    rest = {name: value for name, value in entry.items() if name != image and name not in texts}
    return {
        "image": entry[image],
        "captions": [caption for captions in values.values() for caption in captions],
        _KINDS: [name for name, captions in values.items() for _ in captions],
        **rest,
    }


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(raw.decode().strip())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {reprlib.repr(entry)}")
    return entry


def _check_fields(entry: dict[str, Any], config: FolderConfig, where: str, captionless: bool) -> None:
    for name in ("image", "captions"):
        if name not in entry:
            raise ConfigError(f"{where}: field {name!r} is missing." + nearest(name, list(entry)))
    if not isinstance(entry["image"], str):
        raise ConfigError(f"{where}: image is {reprlib.repr(entry['image'])}, expected a path as a string")

    captions = entry["captions"]
    if not isinstance(captions, list):  # A plain string would pass for a list of its characters.
        raise ConfigError(f"{where}: captions is {reprlib.repr(captions)}, expected a list of strings")
    if not captions and not captionless:
        raise ConfigError(f"{where}: captions is an empty list, expected at least one caption")
    for position, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ConfigError(f"{where}: captions[{position}] is {reprlib.repr(caption)}, expected a string")
        if not caption.strip():
            raise ConfigError(f"{where}: captions[{position}] is {caption!r}, expected text")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where}: captions[{position}] has half of a surrogate pair ({error})") from error

    if config.specific_field in entry:
        specific = entry[config.specific_field]
        if type(specific) is not int or not min(1, len(captions)) <= specific <= len(captions):
            raise ConfigError(
                f"{where}: {config.specific_field} is {reprlib.repr(specific)}, "
                f"expected a whole number from 1 to {len(captions)}, the number of captions"
            )


def _split_of(entry: dict[str, Any], config: FolderConfig, has_split: bool, where: str) -> str:
    name = config.split_field
    if (name in entry) != has_split:
        this, others = ("no", "have one") if has_split else ("a", "have none")
        raise ConfigError(f"{where}: {this} field {name!r} while the lines before {others}; expected all or none")
    if has_split:
        if not isinstance(entry[name], str):
            raise ConfigError(f"{where}: {name} is {reprlib.repr(entry[name])}, expected a string")
        return entry[name]
    digest = hashlib.sha256(entry["image"].encode(errors="surrogatepass")).digest()
    held_out = int.from_bytes(digest[:8], "big") < config.eval_fraction * 2**64
    return config.eval_split if held_out else config.train_split
