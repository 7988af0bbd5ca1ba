"""The members of a tar archive, parsed one by one wherever they begin; names are only compared, never opened."""

import re
import tarfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENSION_BYTES = 2**20
"""Of a long name or a PAX header."""


class NoEndMark(tarfile.ReadError):
    """The archive ends between members, without the blocks of zeros that should follow the last one."""


class Member(NamedTuple):
    """``name`` is None for what is not a regular file; ``end`` is where the next member starts."""

    name: bytes | None
    start: int
    size: int
    end: int


def key_and_extension(name: bytes | None) -> tuple[bytes, bytes] | None:
    """WebDataset's split at the first dot of the last component; None for what is not part of a sample."""
    if name is None:
        return None
    folder, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    if not stem or not dot or (name.startswith(b"__") and re.match(rb"__[^/]*__($|/)", name)):
        return None
    return folder + slash + stem, extension


def read_member(read: Callable[[int, int], bytes], position: int) -> Member | None:
    """The member that starts at ``position`` with its headers; None at the end-of-archive mark.

    Args:
        read: gives the bytes at (start, length), fewer at the end of the file.
        position: of its first header; those for long names and PAX headers belong to the member they precede.

    Raises:
        tarfile.TarError: there is no member.
    """
    name: bytes | None = None
    size: int | None = None
    while True:
        block = read(position, _BLOCK)
        if len(block) < _BLOCK:
            if not block.strip(b"\0"):
                raise NoEndMark("no end-of-archive mark")
            raise tarfile.ReadError("a header is cut off")
        header = _parse_header(block)
        if header is None:
            return None
        kind, own_size, own_name = header
        position += _BLOCK
        if kind not in b"xXgLK":
            break
        if own_size > _MAX_EXTENSION_BYTES:
            raise tarfile.ReadError(f"a header of {own_size} bytes")
        body = read(position, own_size)
        if len(body) < own_size:
            raise tarfile.ReadError("a header is cut off")
        position += _padded(own_size)
        # As in tarfile, what several headers say is taken from the first.
        if kind == b"L" and name is None:
            name = body.partition(b"\0")[0]
        elif kind in b"xXg":
            fields = _parse_pax(body)
            if kind == b"g" and fields:
                raise tarfile.ReadError("a PAX header gives all members the same name or size")
            name = fields.get(b"path") if name is None else name
            if size is None and b"size" in fields:
                if not fields[b"size"].isdigit() or len(fields[b"size"]) > 20:
                    raise tarfile.ReadError("a PAX header gives no number as the size")
                size = int(fields[b"size"])

    if kind == tarfile.GNUTYPE_SPARSE:
        raise tarfile.ReadError("sparse files are not supported")
    # Before POSIX, a folder was a regular file with a slash at the end of its name.
    regular = kind in b"07" or (kind == b"\0" and not own_name.endswith(b"/"))
    if regular or kind not in b"\x00123456":  # members of unknown kinds have data too
        size = own_size if size is None else size
    else:
        size = 0
    return Member((own_name if name is None else name) if regular else None, position, size, position + _padded(size))


def _parse_header(block: bytes) -> tuple[bytes, int, bytes] | None:
    """Kind, size and name of a header block; None for a block of zeros."""
    # Plain headers by hand: TarInfo.frombuf takes ten times as long. Adler-32 knows the sum of the bytes modulo 65521.
    try:
        difference = (zlib.adler32(block) & 0xFFFF) - (zlib.adler32(block[148:156]) & 0xFFFF)
        plain = (difference + 8 * ord(" ") - int(block[148:156].rstrip(b"\0 "), 8)) % 65521 == 0
        size = int(block[124:136].rstrip(b"\0 "), 8)
    except ValueError:
        plain = False
    if plain:
        kind, name = block[156:157], block[:100].partition(b"\0")[0]
        if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
            name = prefix + b"/" + name
    else:
        if not block.strip(b"\0"):
            return None
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        kind, size, name = header.type, header.size, header.name.encode(errors="surrogateescape")
    if size < 0:
        raise tarfile.ReadError("a negative size")
    return kind, size, name


def _parse_pax(body: bytes) -> dict[bytes, bytes]:
    """Those records of a PAX header that change a member's name or size."""
    fields: dict[bytes, bytes] = {}
    if b"path=" not in body and b"size=" not in body and b"GNU.sparse." not in body:
        return fields  # times, as Python writes them
    position = 0
    while position < len(body) and body[position]:
        number = body[position : position + 20].partition(b" ")[0]
        length = int(number) if number.isdigit() else 0
        record = body[position : position + length]
        keyword, equals, value = record[len(number) + 1 : -1].partition(b"=")
        if not equals or len(record) < length or record[-1:] != b"\n" or (keyword == b"size" and not value.isdigit()):
            raise tarfile.ReadError("a malformed PAX header")
        if keyword.startswith(b"GNU.sparse."):
            raise tarfile.ReadError("sparse files are not supported")
        if keyword in (b"path", b"size"):
            fields[keyword] = value
        position += length
    return fields


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
