# SPDX-License-Identifier: Apache-2.0
"""Blocks that are nearly equal: an index of sketches, exact distances, and magnitudes.

All results are the same from every kernel, for any number of threads, and for any cut of a batch
into calls (docs/kernels.md, "Similarity"). Deliberately not here: what is done with similar blocks
(`pydedup.ingest`), and blocks themselves: the index keeps sketches only.
"""

from __future__ import annotations

from pydedup.similarity.index import L2LSH, SIMILARITY_VERSION, Fetch
from pydedup.similarity.measures import Distances, distances, magnitude, upper_bounds

__all__ = [
    "L2LSH",
    "SIMILARITY_VERSION",
    "Distances",
    "Fetch",
    "distances",
    "magnitude",
    "upper_bounds",
]
