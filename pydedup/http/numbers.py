# SPDX-License-Identifier: Apache-2.0
"""Arrays of numbers as JSON, read and written in small pieces.

A parser holds Python's lock until it is done, and the event loop stands still meanwhile: 40 ms for
a million numbers. So a long list is cut where one number ends and the next begins, and each piece
is parsed alone. `outline` takes the lists called "data" out of a document; what is left is small.

Numbers may be NaN, Infinity and -Infinity, as Python writes them, and ``null``, as we do: JSON
itself knows none of these. Deliberately not here: what a request means (`requests`).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from pydedup.arguments import as_dtype
from pydedup.http.problems import HttpError, bad

__all__ = ["PIECE_BYTES", "Lists", "flat_array", "json_numbers", "outline"]

#: About so much is parsed at once: under a millisecond.
PIECE_BYTES = 64 * 1024
#: Numbers that are written at once.
_PIECE_NUMBERS = 8 * 1024
#: JSON without its lists of data is refused above this.
_LARGEST_OUTLINE = 1024 * 1024
_LARGEST_DEPTH = 32
#: After so many pieces (2 to 3 ms) others get their turn. numpy lets go of Python's lock so often
#: and so briefly that a waiting thread wakes too late each time, and never has waited the 5 ms
#: after which it may demand the lock: without a turn it waits until a long list is done.
_TURN_PIECES = 8
_TURN_SECONDS = 1e-9
#: Integers beyond it are not all floats.
_EXACT_FLOAT = 2.0**53

_KEY = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_INSIDE = re.compile(rb'[^"{}:]*')
_OPENING = re.compile(rb"(?:\[[ \t\r\n]*)+")
# From the end of a number, over brackets that close and open as many lists, to the next number.
_CUT = re.compile(
    rb"[0-9a-zA-Z.]((?:[ \t\r\n]*\])*)[ \t\r\n]*,[ \t\r\n]*((?:\[[ \t\r\n]*)*)(?=[-0-9tfnNI])"
)
_NOT_JSON = re.compile(rb"NaN|Infinity")

Lists = list[tuple[int, int]]


def _parse_json(text: bytes | bytearray | memoryview) -> Any:
    """Parse a small document. Raises HttpError 400."""
    try:
        return orjson.loads(text)
    except ValueError as error:
        if len(text) <= _LARGEST_OUTLINE and _NOT_JSON.search(text):
            try:
                return json.loads(bytes(text))
            except (ValueError, RecursionError):
                pass
        raise bad("body", f"it is no JSON: {error}") from None


def outline(body: bytes | bytearray, end: int) -> tuple[Any, Lists]:
    """Parse the document ``body[:end]`` without its long lists of data.

    Returns
    -------
    document
        Where a list was left out, ``[[], [], [i]]`` stands for it.
    lists
        Where the list number i begins and ends.

    Raises
    ------
    HttpError
        400 when it is no JSON, or the rest is too large.
    """
    if end <= PIECE_BYTES:
        return _parse_json(body if end == len(body) else memoryview(body)[:end]), []
    kept: list[bytes | bytearray] = []
    lists: Lists = []
    at = 0
    while True:
        key = body.find(b'"data"', at, end)
        found = None if key < 0 else _KEY.match(body, key, min(key + PIECE_BYTES, end))
        if key >= 0 and found is None:
            kept.append(body[at : key + 6])
            at = key + 6
            continue
        if found is None:
            break
        start = found.end()
        stop = _last_bracket(body, start, _end_of(_INSIDE, body, start, end))
        if stop - start > PIECE_BYTES // 16:
            kept += [body[at:start], b"[[],[],[%d]]" % len(lists)]
            lists.append((start, stop))
        else:
            kept.append(body[at:stop])
        at = stop
    kept.append(body[at:end])
    length = sum(map(len, kept))
    if length > _LARGEST_OUTLINE:
        raise bad(
            "body",
            f"its JSON has {length} bytes beside lists of numbers; at most {_LARGEST_OUTLINE} are "
            "allowed",
            413,
        )
    return _parse_json(b"".join(kept)), lists


def flat_array(
    value: Any,
    body: bytes | bytearray,
    lists: Lists,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    where: str,
) -> NDArray[Any]:
    """Return the numbers of a list, nested like ``shape`` or flat, as an array of that shape.

    Parameters
    ----------
    value
        The list, or what `outline` put in its place.
    where
        The field, for messages.

    Raises
    ------
    HttpError
        400 when these are no numbers of that dtype, or not as many.
    """
    if not isinstance(value, list):
        raise bad(where, f"a list of numbers is needed, not {_kind(value)}")
    count = math.prod(shape)
    pieces: Iterator[tuple[list[Any], bool]] = iter([(value, False)])
    depth = 1
    if lists and len(value) == 3 and value[:2] == [[], []] and value[2]:
        start, stop = lists[_number_of(value[2], len(lists), where)]
        depth, pieces = _pieces(body, start, stop, where)
    else:
        inner: Any = value
        while inner and isinstance(inner[0], list):
            inner = inner[0]
            depth += 1
    if depth > 1 and depth != len(shape):
        raise bad(where, f"it is nested {depth} deep; a flat list, or {len(shape)} deep, is needed")
    row = shape[-1] if depth > 1 else None
    out = np.empty(count, dtype)
    done = filled = 0  # numbers so far, and those of them in the row that a cut went through
    for number, (nested, cut) in enumerate(pieces, 1):
        rows = _rows(nested, depth, where)
        numbers = _convert(list(chain.from_iterable(rows)) if depth > 1 else nested, dtype, where)
        if done + len(numbers) > count:
            raise bad(where, f"it has more than the {count} numbers of shape {list(shape)}")
        out[done : done + len(numbers)] = numbers
        done += len(numbers)
        if row is not None:
            lengths = [len(part) for part in rows]
            if lengths:
                lengths[0] += filled
            filled = lengths.pop() if cut and lengths else 0
            if any(length != row for length in lengths):
                raise bad(where, f"its innermost lists must have {row} numbers each, as in shape")
        if number % _TURN_PIECES == 0:
            time.sleep(_TURN_SECONDS)
    if done != count:
        raise bad(where, f"it has {done} numbers; shape {list(shape)} needs {count}")
    return out.reshape(shape)


def json_numbers(array: NDArray[Any]) -> Iterator[bytes]:
    """Yield the numbers of an array, flat, as the text between the brackets of a list."""
    flat = np.ascontiguousarray(array).reshape(-1)
    for at in range(0, flat.size, _PIECE_NUMBERS):
        text = orjson.dumps(flat[at : at + _PIECE_NUMBERS], option=orjson.OPT_SERIALIZE_NUMPY)
        yield text[1:-1] if at == 0 else b"," + text[1:-1]


# ---- inside -------------------------------------------------------------------------------------


def _end_of(pattern: re.Pattern[bytes], body: bytes | bytearray, at: int, end: int) -> int:
    """Return where a run of bytes ends, looking at a piece at a time."""
    while at < end:
        limit = min(at + PIECE_BYTES, end)
        found = pattern.match(body, at, limit)
        at = limit if found is None else found.end()
        if at < limit:
            break
    return at


def _last_bracket(body: bytes | bytearray, start: int, end: int) -> int:
    """Return where a list ends that is the only thing between two places."""
    return max(body.rfind(b"]", start, end) + 1, start + 1)


def _number_of(value: Any, count: int, where: str) -> int:
    good = isinstance(value, list) and len(value) == 1 and isinstance(value[0], int)
    if not good or not 0 <= value[0] < count:
        raise bad(where, "numbers are needed, not empty lists")
    return int(value[0])


def _pieces(
    body: bytes | bytearray, start: int, stop: int, where: str
) -> tuple[int, Iterator[tuple[list[Any], bool]]]:
    """Return how deep a list is nested, and its pieces, each with whether its last row goes on."""
    opening = _OPENING.match(body, start, min(start + PIECE_BYTES, stop))
    assert opening is not None
    depth = opening.group().count(b"[")
    if depth > _LARGEST_DEPTH:
        raise bad(where, f"it is nested {depth} deep; {_LARGEST_DEPTH} is the most")
    # The brackets that close what these opened; any others are found when a piece is parsed.
    at = stop
    for _ in range(depth):
        at = body.rfind(b"]", max(opening.end(), at - PIECE_BYTES), at)
        if at < 0 or body[at:stop].strip(b"] \t\r\n"):
            raise bad(where, "it is no JSON: a list is not closed")
    return depth, _cut(body, opening.end(), at, depth, where)


def _cut(
    body: bytes | bytearray, at: int, stop: int, depth: int, where: str
) -> Iterator[tuple[list[Any], bool]]:
    opened, closed = b"[" * depth, b"]" * depth
    while True:
        end, following, goes_on = stop, stop, False
        if stop - at > PIECE_BYTES:
            found = _CUT.search(body, at + PIECE_BYTES, min(at + 2 * PIECE_BYTES, stop))
            if found is not None:
                end, following = found.start() + 1, found.end()
                goes_on = not found.group(1)
                closes, opens = found.group(1).count(b"]"), found.group(2).count(b"[")
                if closes != opens or closes >= depth:  # or the list itself would end here
                    raise bad(where, "its lists must be nested equally deep")
            elif stop - at > 2 * PIECE_BYTES:
                raise bad(where, f"there is no number within {PIECE_BYTES} bytes")
        try:
            # What is between two cuts begins and ends in an innermost list.
            yield _parse_json(opened + body[at:end] + closed), goes_on
        except HttpError as error:
            raise bad(where, error.message.removeprefix("body: ")) from None
        if following == stop and end == stop:
            return
        at = following


def _rows(nested: Any, depth: int, where: str) -> list[Any]:
    """Return the innermost lists."""
    level = [nested]
    for _ in range(depth - 1):
        level = list(chain.from_iterable(level))
        if not all(isinstance(item, list) for item in level):
            raise bad(where, "its lists must be nested equally deep")
    return level


def _convert(numbers: list[Any], dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    """Return numbers in a dtype that holds them."""
    if not numbers:
        return np.empty(0, dtype)
    try:
        # Left to itself, numpy makes floats of large integers beside small ones.
        whole = dtype.kind in "iu" and set(map(type, numbers)) == {int}
        signed = dtype != np.uint64 or (whole and min(numbers) < 0)
        found = np.array(numbers, (np.int64 if signed else np.uint64) if whole else None)
    except (ValueError, OverflowError):
        found = np.empty(0, object)
    if found.dtype == object and dtype.kind == "f" and _are_plain(numbers):
        try:
            found = np.array(numbers, np.float64)  # null becomes NaN
        except OverflowError:
            raise bad(where, "it has an integer beyond all floats") from None
    if found.ndim != 1 or found.dtype.kind not in "biuf":
        odd = next((item for item in numbers if type(item) not in (int, float)), numbers[0])
        if type(odd) is int:
            raise bad(where, f"it has an integer beyond {dtype.name}")
        raise bad(where, f"numbers are needed, not {_kind(odd)}")
    # numpy takes true for 1; types are only looked at where that may be, which takes a while.
    if dtype.kind != "b" and ((found == 0) | (found == 1)).any() and bool in map(type, numbers):
        raise bad(where, f"numbers are needed, not {_kind(True)}, which are of BOOL alone")
    if dtype.kind == "f":
        return _narrowed(found, dtype, where)
    return _whole(found, dtype, where)


def _are_plain(numbers: list[Any]) -> bool:
    return all(item is None or type(item) in (int, float) for item in numbers)


def _narrowed(found: NDArray[Any], dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    out = as_dtype(found, dtype)
    beyond = np.isinf(out)
    if beyond.any():  # Infinity itself stays what it is
        beyond &= np.isfinite(found)
        if beyond.any():
            most = np.finfo(dtype).max
            raise bad(where, f"{found[beyond][0]} is no {dtype.name}: the largest is {most}")
    return out


def _whole(found: NDArray[Any], dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    if found.dtype.kind == "f":
        # Not finite, with a fraction, or maybe rounded: what it was cannot be known.
        good = np.abs(found) <= _EXACT_FLOAT
        good &= found == np.trunc(found)
        if not good.all():
            raise bad(where, f"{found[~good][0]} is no {dtype.name}")
        found = found.astype(np.int64)
    if dtype.kind == "b":
        least, most = 0, 1
    else:
        least, most = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    low, high = int(found.min()), int(found.max())
    if low < least or high > most:
        wrong = low if low < least else high
        raise bad(where, f"{wrong} is no {dtype.name}: it must be from {least} to {most}")
    return found.astype(dtype)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", str: "text", dict: "an object", list: "a list"}
    return names.get(type(value), f"{value!r}")
