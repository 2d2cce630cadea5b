# SPDX-License-Identifier: Apache-2.0
"""Artifacts of a model, such as a tokenizer: large ones are kept in blocks, like its tensors.

So versions and models that have one in common keep it once, and it is compressed. Small ones are
in rows of their own, where a graph is read without a page. A file is cut where its content says so
(content-defined chunking: Muthitacharoen et al., A Low-bandwidth Network File System, SOSP 2001,
section 3.1), as most differ by what was put in: truncation, or a token, at the head of a tokenizer.

What fills up its chunks compresses to next to nothing with the text before it. Where that is noise,
such as of images, it would stay: 7 % of a file. Such a file is cut by content seldom.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pydedup.blocks import MatrixView
from pydedup.catalog import chunk_lengths, laid_out
from pydedup.encoding import Encoding, encode_blocks
from pydedup.formats.base import TensorEntry
from pydedup.hashing import hash_view
from pydedup.ingest.match import Matcher
from pydedup.ingest.spool import NO_BASE
from pydedup.ingest.staged import MatchedTensor, StagedModel
from pydedup.types import DType

__all__ = ["LEAST_BYTES", "cut_at", "in_chunks", "is_noise", "match_artifacts"]

#: From so many bytes on an artifact is kept in blocks.
LEAST_BYTES: Final = 16 * 1024
#: A chunk has so many bytes, unless it is the last one; it is a block of the larger number.
_SHORTEST: Final = 28 * 1024
_LONGEST: Final = 32 * 1024
#: Bytes that decide whether a chunk ends behind them, and one of how many places they choose.
_WINDOW: Final = 8
_ONE_OF_BITS: Final = 11
#: The same for noise: most chunks are then full, and the ends of about one in 16 are chosen.
_ONE_OF_NOISE_BITS: Final = 16
#: Noise is told of so large a file, by so many parts as long as a chunk.
_LEAST_NOISE_BYTES: Final = 1024 * 1024
_SAMPLES: Final = 16
#: An odd number, so that all bits of the window take part in the highest of the product.
_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)


class _Bytes:
    """The bits, whatever the policy of the model; without deltas, as files are seldom near by."""

    name = "artifact"
    compresses = True
    uses_deltas = False
    max_rel_error = 0.0

    def parameters(self) -> Mapping[str, Any]:
        """Return nothing: it is recorded nowhere."""
        return {}


_POLICY: Final = _Bytes()


def match_artifacts(matcher: Matcher, model: StagedModel) -> None:
    """Read the artifacts of a model, and find or keep the blocks of large ones."""
    for name, payload in model.note_artifacts():
        if len(payload) < LEAST_BYTES:
            continue
        view, lengths = in_chunks(payload, seldom=_is_cut_seldom(matcher, payload))
        found = matcher.match(view, policy=_POLICY)
        entry = TensorEntry(name, DType.U8, (view.grid.rows, view.grid.cols), name)
        part = MatchedTensor(entry, view.grid, found.references, found.digests)
        model.keep_in_blocks(part, chunk_lengths(lengths))


def in_chunks(payload: bytes, *, seldom: bool = False) -> tuple[MatrixView, list[int]]:
    """Return an artifact as the matrix that it is kept as, and the lengths of its chunks."""
    content = np.frombuffer(payload, np.uint8)
    lengths = np.diff(cut_at(content, seldom=seldom), prepend=0).tolist()
    width = _LONGEST if len(lengths) > 1 else len(payload)
    return MatrixView.of(laid_out(content, lengths, width), (1, width)), lengths


def is_noise(payload: bytes) -> bool:
    """Whether a large artifact is of bytes that do not compress, for the most part."""
    if len(payload) < _LEAST_NOISE_BYTES:
        return False
    content = np.frombuffer(payload, np.uint8)
    starts = np.linspace(0, len(content) - _LONGEST, _SAMPLES).astype(np.int64).tolist()
    parts = np.stack([content[start : start + _LONGEST] for start in starts])
    view = MatrixView.of(parts, (1, _LONGEST))
    encodings = encode_blocks(view, np.arange(_SAMPLES), planes=True).encodings
    return int((encodings == Encoding.RAW).sum()) * 2 > _SAMPLES


def _is_cut_seldom(matcher: Matcher, payload: bytes) -> bool:
    """Whether to cut an artifact seldom: noise, unless more of it is there as older adds cut it."""
    if not is_noise(payload):
        return False

    def stored(seldom: bool) -> int:
        view, _ = in_chunks(payload, seldom=seldom)
        return int((matcher.find(view, hash_view(view)) != NO_BASE).sum())

    return stored(True) >= stored(False)


def cut_at(content: NDArray[np.uint8], *, seldom: bool = False) -> NDArray[np.int64]:
    """Return where chunks end, the last one with the content, uint8 (n,); int64, ascending."""
    ends, start, bits = [], 0, _ONE_OF_NOISE_BITS if seldom else _ONE_OF_BITS
    while len(content) - start > _LONGEST:
        start += _length_of_chunk(content[start : start + _LONGEST], bits)
        ends.append(start)
    return np.array([*ends, len(content)], np.int64)


def _length_of_chunk(content: NDArray[np.uint8], bits: int) -> int:
    """Return how much of this is the next chunk: up to the first window that chooses its end."""
    piece = content[_SHORTEST - _WINDOW :].astype(np.uint64)
    count = len(piece) - _WINDOW + 1
    words = np.zeros(count, np.uint64)
    for byte in range(_WINDOW):
        words |= piece[byte : byte + count] << np.uint64(8 * byte)
    chosen = np.flatnonzero((words * _FACTOR) >> np.uint64(64 - bits) == 0)
    return _SHORTEST + int(chosen[0]) if len(chosen) else _LONGEST
