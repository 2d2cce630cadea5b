# SPDX-License-Identifier: Apache-2.0
"""Values of a store's own columns, as the types that these have.

Drivers differ in what they give: text comes as bytes, bytes as a buffer, a sum as a decimal. And
in a damaged file of SQLite, which keeps the type of a value beside it, anything may come.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from types import NoneType
from typing import Any, Final

from pydedup._pages import join_parts

__all__ = ["Row", "WrongValueError", "as_number", "as_recorded", "shown", "text"]

Row = tuple[Any, ...]

HASH_BYTES: Final = 16
_BUFFERS: Final = (bytes, bytearray, memoryview)
#: Kind of a column (see ``_schema.Dialect.types``) -> its type, and what an error calls it.
_KINDS: Final[Mapping[str, tuple[type, str]]] = {
    **dict.fromkeys(("id", "int"), (int, "a whole number")),
    "float": (float, "a number"),
    **dict.fromkeys(("word", "name", "text"), (str, "text")),
    "hash": (bytes, f"a hash of {HASH_BYTES} bytes"),
    "blob": (bytes, "bytes"),
}

#: A number in ``meta``, whose values are texts. With more digits it may be one to which no database
#: can add; with a 0 before it, it would never be equal to what is compared with it.
_NUMBER: Final = re.compile("0|[1-9][0-9]{0,17}")


class WrongValueError(Exception):
    """A value that its column cannot have; the arguments are its number and what says so."""


def text(value: str | bytes | bytearray | memoryview) -> str:
    """Return text that a driver may deliver as bytes (MySQL's VARBINARY names)."""
    return value if isinstance(value, str) else str(value, "utf-8")


def as_number(value: str) -> int | None:
    """Return a number that is recorded as a text; ``None`` for what none was ever recorded as."""
    return int(value) if _NUMBER.fullmatch(value) else None


def shown(value: object) -> object:
    """Return a value of a damaged row as it is shown: as text, where it may be bytes of one."""
    if not isinstance(value, _BUFFERS):
        return value
    try:
        return text(value)
    except UnicodeDecodeError:
        return bytes(value)


@lru_cache
def _types(kinds: tuple[str, ...]) -> list[type | tuple[type, ...]]:
    """Return what `isinstance` is asked about values of these kinds; once, as rows come singly."""
    return [
        (_KINDS[kind.rstrip("?")][0], NoneType) if kind.endswith("?") else _KINDS[kind][0]
        for kind in kinds
    ]


def as_recorded(rows: list[Row], kinds: Sequence[str]) -> list[Row]:
    """Return rows with values of the types of their columns; a kind in ``?`` may be NULL.

    Raises WrongValueError.
    """
    plain = _types(tuple(kinds))
    # Nearly all are as they must be, and there may be millions.
    found = [row if all(map(isinstance, row, plain)) else _converted(row, kinds) for row in rows]
    for number, kind in enumerate(kinds):
        if kind == "hash" and any(len(row[number]) != HASH_BYTES for row in found):
            wrong = next(row[number] for row in found if len(row[number]) != HASH_BYTES)
            raise _wrong(number, wrong, kind)
    return found


def _converted(row: Row, kinds: Sequence[str]) -> Row:
    values: list[Any] = []
    for number, (value, kind) in enumerate(zip(row, kinds, strict=True)):
        expected = _KINDS[kind.rstrip("?")][0]
        if isinstance(value, expected) or (value is None and kind.endswith("?")):
            values.append(value)
        elif expected is bytes and isinstance(value, _BUFFERS):
            values.append(join_parts([value]))
        elif expected is str and isinstance(value, _BUFFERS):
            try:
                values.append(text(value))
            except UnicodeDecodeError as error:
                raise _wrong(number, value, kind) from error
        elif (expected is float and isinstance(value, int)) or (
            expected is int and isinstance(value, Decimal) and value == value.to_integral_value()
        ):
            values.append(expected(value))
        else:
            raise _wrong(number, value, kind)
    return tuple(values)


def _wrong(number: int, value: object, kind: str) -> WrongValueError:
    plain = bytes(value) if isinstance(value, _BUFFERS) else value
    found = "NULL" if value is None else f"{plain!r:.60}"
    return WrongValueError(number, f"{found} where {_KINDS[kind.rstrip('?')][1]} must be")
