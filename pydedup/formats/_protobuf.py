# SPDX-License-Identifier: Apache-2.0
"""Walking protobuf messages in a file without loading them, and the two codings to write one.

The protobuf library can only parse a message whole, with everything in it in memory. The wire
format is simple enough to step over large fields and remember where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydedup.errors import FormatError
from pydedup.formats._files import RawFile

__all__ = ["BYTES", "VARINT", "Field", "tag", "varint", "walk"]

VARINT, _FIXED64, BYTES, _FIXED32 = 0, 1, 2, 5
#: A tag of up to 5 bytes and a length of up to 10.
_PREFIX = 15


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its number and wire type, where it begins (tag), its value begins, and it ends."""

    number: int
    wire: int
    begin: int
    value: int
    end: int

    @property
    def length(self) -> int:
        """Bytes of the value."""
        return self.end - self.value


def walk(raw: RawFile, begin: int, end: int) -> Iterator[Field]:
    """Yield the fields of the message in ``[begin, end)``, reading only their tags.

    Raises
    ------
    FormatError
        When the bytes are no protobuf message.
    """
    position = begin
    while position < end:
        prefix = raw.read_at(position, min(_PREFIX, end - position))
        key, used = _read_varint(raw, prefix, 0, position)
        number, wire = key >> 3, key & 7
        value = position + used
        if wire == VARINT:
            _, after = _read_varint(raw, prefix, used, position)
            stop = position + after
        elif wire == BYTES:
            length, after = _read_varint(raw, prefix, used, position)
            value = position + after
            stop = value + length
        elif wire in (_FIXED64, _FIXED32):
            stop = value + (8 if wire == _FIXED64 else 4)
        else:
            raise _damaged(raw, position)
        if number == 0 or stop > end:
            raise _damaged(raw, position)
        yield Field(number, wire, position, value, stop)
        position = stop


def varint(value: int) -> bytes:
    """Return the variable-length coding of a non-negative integer."""
    out = bytearray()
    while value > 0x7F:
        out.append(0x80 | (value & 0x7F))
        value >>= 7
    out.append(value)
    return bytes(out)


def tag(number: int) -> bytes:
    """Return the tag that begins a field of bytes."""
    return varint(number << 3 | BYTES)


def _read_varint(raw: RawFile, data: bytes, at: int, position: int) -> tuple[int, int]:
    value = shift = 0
    for index in range(at, min(len(data), at + 10)):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index + 1
        shift += 7
    raise _damaged(raw, position)


def _damaged(raw: RawFile, position: int) -> FormatError:
    return FormatError(
        f"{raw.path} is truncated or no ONNX model: its structure breaks at byte {position}"
    )
