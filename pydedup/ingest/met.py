# SPDX-License-Identifier: Apache-2.0
"""Large tensors of an add by all that their blocks hash to: models of a family share most of them.

Where a tensor was met before, its blocks are compared with what that one's became, at once. Looked
up one by one they would come to the same.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from pydedup.blocks import MatrixView
from pydedup.hashing import digest_bytes
from pydedup.ingest.places import BlockReader
from pydedup.ingest.spool import NO_BASE

__all__ = ["MetTensors"]


class MetTensors:
    """References of the blocks of tensors that were matched. Not thread-safe.

    Whoever matched them keeps the references too, so that a tensor takes one entry here.
    """

    def __init__(self, reader: BlockReader) -> None:
        self._reader = reader
        self._references: dict[bytes, NDArray[np.int64]] = {}

    def has(self, digests: NDArray[np.uint64]) -> bool:
        """Whether a tensor with these digests, uint64 (n, 2), was noted."""
        return _fingerprint(digests) in self._references

    def note(self, digests: NDArray[np.uint64], references: NDArray[np.int64]) -> None:
        """Take note of what the blocks of a tensor became; nobody changes that array any more."""
        self._references.setdefault(_fingerprint(digests), references)

    def find(
        self, view: MatrixView, digests: NDArray[np.uint64], known: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return ``known`` with references of identical blocks for `NO_BASE`, where it was met.

        Identical: of one dtype, shape and bytes, which is looked at.
        """
        met = self._references.get(_fingerprint(digests))
        if met is None:
            return known
        references = known.copy()
        unknown = np.flatnonzero(known == NO_BASE)
        same = unknown[self._reader.equal(view, unknown, met[unknown])]
        references[same] = met[same]
        return references


def _fingerprint(digests: NDArray[np.uint64]) -> bytes:
    return hashlib.blake2b(digest_bytes(digests), digest_size=16).digest()
