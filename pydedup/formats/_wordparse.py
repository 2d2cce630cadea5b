# SPDX-License-Identifier: Apache-2.0
"""Parsing word vectors in bounded pieces.

Thousands of rows are parsed together; only where something is unusual, lines are taken one by
one, so that the message names the line.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pydedup.errors import FormatError
from pydedup.formats._files import RawFile
from pydedup.formats.base import Array

__all__ = ["binary_records", "is_number", "text_rows"]

_PIECE = 4 << 20
#: A word longer than this is damage; without a bound a binary file without spaces would be
#: searched to its end for every word.
_MAX_WORD = 1 << 16


def text_rows(
    raw: RawFile, start: int, columns: int, *, first_line: int
) -> Iterator[tuple[list[bytes], Array]]:
    """Yield (words, float32 rows) from ``start`` to the end of the file.

    Raises
    ------
    FormatError
        Naming the first line that is not a word and ``columns`` numbers.
    """
    line_number = first_line
    for lines in _lines(raw, start):
        words, vectors = _fast(lines, columns)
        if vectors is None:
            words, rows = [], np.empty((len(lines), columns), np.float32)
            for index, line in enumerate(lines):
                where = f"{raw.path}, line {line_number + index}"
                word, numbers = _split(line, columns, where)
                words.append(word)
                rows[index] = _numbers(numbers, where)
            vectors = rows
        line_number += len(lines)
        yield words, vectors


def binary_records(
    raw: RawFile, start: int, rows: int, columns: int
) -> Iterator[tuple[list[bytes], Array]]:
    """Yield (words, float32 rows) of word2vec binary.

    Raises
    ------
    FormatError
        Naming the word at which the file ends early, or that something follows the last.
    """
    width = 4 * columns
    position = start
    buffer = b""
    done = 0
    while done < rows:
        words: list[bytes] = []
        vectors: list[bytes] = []
        at = 0
        while done < rows:
            space = buffer.find(b" ", at, at + _MAX_WORD)
            if space < 0 or space + 1 + width > len(buffer):
                break
            words.append(buffer[at:space].lstrip(b"\n"))
            vectors.append(buffer[space + 1 : space + 1 + width])
            if b"\n" in words[-1]:
                raise FormatError(f"{raw.path}: word {done + 1} of {rows} holds a line break")
            at = space + 1 + width
            done += 1
        if words:
            yield words, np.frombuffer(b"".join(vectors), "<f4").reshape(-1, columns)
        buffer = buffer[at:]
        if done == rows:
            break
        if len(buffer) > _MAX_WORD + width:
            raise FormatError(f"{raw.path}: word {done + 1} of {rows} has no end; it is damaged")
        more = min(max(_PIECE, width), raw.size - position)
        if more == 0:
            raise FormatError(f"{raw.path} is truncated: it ends in word {done + 1} of {rows}")
        buffer += raw.read_at(position, more)
        position += more
    rest = min(raw.size - position, 2)
    if buffer.strip(b"\n") or rest > 1 or raw.read_at(position, rest).strip(b"\n"):
        raise FormatError(
            f"{raw.path} goes on after the {rows} words that its first line announces; "
            "it is damaged"
        )


def _lines(raw: RawFile, start: int) -> Iterator[list[bytes]]:
    rest = b""
    position = start
    while position < raw.size:
        n_bytes = min(_PIECE, raw.size - position)
        piece = rest + raw.read_at(position, n_bytes)
        position += n_bytes
        lines = piece.split(b"\n")
        rest = lines.pop()
        if len(rest) > 16 * _PIECE:
            raise FormatError(f"{raw.path} has a line of over {len(rest)} bytes; it is damaged")
        if lines:
            yield lines
    if rest.strip():
        yield [rest]


def _fast(lines: list[bytes], columns: int) -> tuple[list[bytes], Array | None]:
    """Parse lines that are all exactly a word and numbers between single spaces."""
    words: list[bytes] = []
    numbers: list[bytes] = []
    for line in lines:
        # The original word2vec program ends lines with a space.
        word, _, rest = line.rstrip(b" \r").partition(b" ")
        if rest.count(b" ") != columns - 1 or not word:
            return [], None
        words.append(word)
        numbers.append(rest)
    joined = b" ".join(numbers)
    if b"_" in joined:  # Python reads 1_0 as 10
        return [], None
    # float() rather than numpy.fromstring, which is hardly faster and stops at what it does not
    # understand instead of refusing it.
    try:
        values = np.array(list(map(float, joined.split(b" "))))
    except ValueError:
        return [], None
    return words, values.astype(np.float32).reshape(-1, columns)


def _split(line: bytes, columns: int, where: str) -> tuple[bytes, list[bytes]]:
    fields = line.replace(b"\t", b" ").rstrip(b" \r").split(b" ")
    if len(fields) < columns + 1 or not fields[0]:
        raise FormatError(
            f"{where}: a word and {columns} numbers are needed, {len(fields)} fields are there"
        )
    word, numbers = fields[:-columns], fields[-columns:]
    # GloVe's largest vocabulary has words with spaces, such as ". . .". A number too many is
    # something else: a ragged line.
    if len(word) > 1 and any(is_number(part) for part in word[1:]):
        raise FormatError(
            f"{where}: {columns} numbers are needed, {len(fields) - 1} fields follow the word"
        )
    return b" ".join(word), numbers


def _numbers(fields: list[bytes], where: str) -> Array:
    for field in fields:
        if not is_number(field):
            raise FormatError(f"{where}: {field!r:.40} is no number")
    return np.array([float(field) for field in fields], np.float64).astype(np.float32)


def is_number(field: bytes) -> bool:
    """Return whether the bytes are one decimal number, infinity or NaN."""
    try:
        float(field)
    except ValueError:
        return False
    return b"_" not in field
