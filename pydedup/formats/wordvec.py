# SPDX-License-Identifier: Apache-2.0
"""Word vectors: word2vec text and binary, and GloVe text.

    GloVe            one line per word: the word, then its numbers
    word2vec text    the same after a first line with the number of words and of dimensions
    word2vec binary  that first line, then per word: the word, a space, float32 little endian

The vectors become the tensor ``embedding`` (words x dimensions, float32), the words the artifact
``pydedup:vocabulary``: one a line, as the bytes of the file, since published files hold words
that are no valid UTF-8.

A file is parsed once, front to back, into an unnamed temporary file (in ``TMPDIR``), which then
serves the tensor: memory holds a piece of the file and the vocabulary, never the vectors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from pydedup.errors import FormatError, UnsupportedFormatError
from pydedup.formats._files import RawFile, open_raw, room_for_copy
from pydedup.formats._wordparse import binary_records, is_number, text_rows
from pydedup.formats.base import (
    DERIVED,
    Array,
    Artifact,
    ModelSource,
    Outgoing,
    TensorEntry,
    find_artifact,
)
from pydedup.types import DType

__all__ = [
    "TENSOR",
    "VOCABULARY",
    "WordVectorSource",
    "detect",
    "write_glove",
    "write_word2vec_binary",
    "write_word2vec_text",
]

#: Name of the only tensor.
TENSOR = "embedding"
#: Name of the artifact with the words, one a line.
VOCABULARY = DERIVED + "vocabulary"

_HEAD = 1 << 20


class WordVectorSource(ModelSource):
    """Reader of one file of word vectors. Safe between threads."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(str(path))
        self.format = kind
        self._spool = tempfile.TemporaryFile(prefix="pydedup-")  # noqa: SIM115 - lives as long as the source
        self._words: list[bytes] = []
        try:
            with open_raw(path) as raw, room_for_copy(path):
                rows, columns = self._parse(raw, kind)
                self._spool.flush()
            self._vectors = RawFile(Path(f"/proc/self/fd/{self._spool.fileno()}"))
        except BaseException:
            self._spool.close()
            raise
        self._set_entries([TensorEntry(TENSOR, DType.F32, (rows, columns), key=TENSOR)])

    def artifacts(self) -> Iterator[Artifact]:
        """Yield the vocabulary."""
        yield Artifact(VOCABULARY, "text/plain", b"\n".join(self._words))

    def close(self) -> None:
        """Drop the temporary file; arrays from it stay valid."""
        self._spool.close()
        self._vectors.close()

    def _read(self, entry: TensorEntry) -> Array:
        return self._vectors.array(0, entry.dtype.numpy, entry.shape)

    def _parse(self, raw: RawFile, kind: str) -> tuple[int, int]:
        head = raw.read_at(0, min(raw.size, _HEAD))
        start, rows, columns = 0, -1, -1
        if kind == "glove":
            columns = _glove_columns(head) or 0
        else:
            header = _word2vec_header(head)
            if header is not None:
                start, rows, columns = header
        if columns < 1:
            raise FormatError(f"{raw.path} does not begin like {kind} word vectors")
        # A header that claims more than the file can hold is caught before any space is taken:
        # a number takes at least two characters in text, four bytes in binary.
        least = 2 + columns * (4 if kind == "word2vec-binary" else 2)
        if rows >= 0 and rows * least > raw.size - start + 1:
            raise FormatError(
                f"{raw.path} should hold {rows} words of {columns} dimensions but has only "
                f"{raw.size} bytes; it is truncated or its first line is damaged"
            )
        if kind == "word2vec-binary":
            pieces = binary_records(raw, start, rows, columns)
        else:
            pieces = text_rows(raw, start, columns, first_line=1 if kind == "glove" else 2)
        for words, vectors in pieces:
            self._words += words
            self._spool.write(vectors.astype("<f4", copy=False).tobytes())
        if rows >= 0 and len(self._words) != rows:
            raise FormatError(
                f"{raw.path} should hold {rows} words but has {len(self._words)}; it is truncated "
                "or its first line is damaged"
            )
        return len(self._words), columns


def detect(head: bytes) -> str | None:
    """Return ``"glove"``, ``"word2vec"``, ``"word2vec-binary"`` or ``None`` for a file's start."""
    header = _word2vec_header(head)
    if header is not None:
        start, rows, columns = header
        if rows == 0 and not head[start:].strip():
            return "word2vec"
        line, newline, _ = head[start:].partition(b"\n")
        if _line_columns(line, columns) and (newline or len(head) < _HEAD):
            return "word2vec"
        word, space, _ = head[start : start + 4096].partition(b" ")
        return "word2vec-binary" if space and word.strip() else None
    return "glove" if _glove_columns(head) else None


def write_glove(path: Path, outgoing: Outgoing) -> None:
    """Write GloVe text; numbers are as short as they can be and still read back equal."""
    _write(path, outgoing, "GloVe text", header=False, row=_text_row)


def write_word2vec_text(path: Path, outgoing: Outgoing) -> None:
    """Write word2vec text; numbers are as short as they can be and still read back equal."""
    _write(path, outgoing, "word2vec text", header=True, row=_text_row)


def write_word2vec_binary(path: Path, outgoing: Outgoing) -> None:
    """Write word2vec binary, as the original program does, with a newline after each vector."""
    _write(path, outgoing, "word2vec binary", header=True, row=_binary_row)


def _write(
    path: Path,
    outgoing: Outgoing,
    what: str,
    *,
    header: bool,
    row: Callable[[IO[bytes], bytes, Array], object],
) -> None:
    entries = outgoing.entries
    if len(entries) != 1 or len(entries[0].shape) != 2:
        raise UnsupportedFormatError(
            f"{what} holds one table of word vectors, the model has {len(entries)} tensors; "
            "export to safetensors"
        )
    entry = entries[0]
    if entry.dtype not in (DType.F32, DType.F16, DType.BF16, DType.F8_E4M3, DType.F8_E5M2):
        raise UnsupportedFormatError(
            f"{what} is read back as float32, which cannot hold {entry.dtype.label}; load with "
            "dtype='f32', or export to safetensors"
        )
    payload = find_artifact(outgoing.artifacts, VOCABULARY)
    words = [] if not payload else payload.split(b"\n")
    if payload is None or len(words) != entry.shape[0]:
        raise UnsupportedFormatError(
            f"{what} needs a word for each of the {entry.shape[0]} rows, the model has "
            f"{len(words)}; export to safetensors"
        )
    array = outgoing.fetch(entry)
    with path.open("wb") as file:
        if header:
            file.write(b"%d %d\n" % entry.shape)
        for index, word in enumerate(words):
            row(file, word, array[index].astype(np.float32))


def _text_row(file: IO[bytes], word: bytes, vector: Array) -> None:
    # Published vectors have 4 to 6 significant digits; 9 hold any float32.
    values = tuple(vector.tolist())
    text = b" %.6g" * len(values) % values
    again = np.array(text.split(), np.float64).astype(np.float32)
    if again.tobytes() != vector.tobytes():
        text = b" %.9g" * len(values) % values
    file.write(word + text + b"\n")


def _binary_row(file: IO[bytes], word: bytes, vector: Array) -> None:
    if b" " in word:
        raise UnsupportedFormatError(
            f"word2vec binary cannot hold the word {word!r:.60} with a space in it; export to GloVe"
        )
    file.write(word + b" " + vector.astype("<f4", copy=False).tobytes() + b"\n")


def _word2vec_header(head: bytes) -> tuple[int, int, int] | None:
    """Return (bytes of the first line, rows, columns)."""
    line, newline, _ = head[:64].partition(b"\n")
    fields = line.split()
    if not newline or len(fields) != 2 or not all(field.isdigit() for field in fields):
        return None
    return len(line) + 1, int(fields[0]), int(fields[1])


def _glove_columns(head: bytes) -> int | None:
    """Return how many numbers end the first line."""
    line = head.partition(b"\n")[0]
    if b"\x00" in line or _word2vec_header(line + b"\n"):
        return None  # two integers begin (or are all that is left of) the other format
    fields = line.replace(b"\t", b" ").rstrip().split(b" ")
    columns = 0
    for field in reversed(fields[1:]):
        if not is_number(field):
            break
        columns += 1
    return columns or None


def _line_columns(line: bytes, columns: int) -> bool:
    fields = line.replace(b"\t", b" ").rstrip().split(b" ")
    return len(fields) > columns and all(is_number(field) for field in fields[-columns:])
