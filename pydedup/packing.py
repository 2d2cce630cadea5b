# SPDX-License-Identifier: Apache-2.0
"""Page packing: which distinct block goes on which page.

Here are the typed entry to the packers of the native core and the layout they give back.
Deliberately not here: pages as bytes (`pydedup.codec`) and where they are stored
(`pydedup.ingest`).
"""

from __future__ import annotations

import itertools
from array import array as array_of
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import _core
from pydedup.arguments import as_array, as_count, as_integers
from pydedup.errors import ArgumentError
from pydedup.sets import distinct
from pydedup.words import Algorithm, check_word

__all__ = ["Algorithm", "Layout", "Owners", "Sizes", "pack"]


#: Distinct block ids per model: a sequence of sets, lists or integer arrays, or one CSR pair
#: ``(indptr, ids)``. A tuple of exactly two arrays is a CSR pair; two models go into a list.
Owners: TypeAlias = (
    Sequence[Collection[int] | NDArray[np.integer[Any]]]
    | tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]
)

#: Bytes per block: by id, or aligned to the distinct ids of all owners in ascending order.
Sizes: TypeAlias = Mapping[int, int] | Sequence[int] | NDArray[np.integer[Any]]

_Rows: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Which block is on which page, and which pages each model reads.

    Page numbers count the existing pages first, then the new ones. All arrays are read-only.

    Attributes
    ----------
    algorithm, capacity
        As given to `pack`.
    in_bytes
        Whether the capacity is in bytes (sizes were given) rather than in blocks.
    existing_pages
        Number of pages that were stored already.
    pages
        The new pages: int64 arrays of block ids in slot order.
    reads
        Per model, an int64 array of the page numbers to read for all of its blocks, ascending.
    page_reads
        int64 per model: how many those are.
    least_reads
        int64 per model: the bound on pages if it were alone, computed like ``lower_bound``.
    lower_bound
        No layout stores fewer pages: the existing ones, and for the new blocks ceil(blocks or
        bytes / capacity), or more where large blocks leave room that no small one fills (bound L2
        of Martello and Toth). Reached with blocks of equal size; others may need more.
    optimal
        Proved: no layout of the new blocks stores fewer pages, nor, with as many, has less
        weighted page reads (weights to 24 bits). False when not proved, which happens with many
        blocks, and always for the other algorithms than ``layout``.
    """

    algorithm: Algorithm
    capacity: int
    in_bytes: bool
    existing_pages: int
    pages: list[NDArray[np.int64]]
    reads: list[NDArray[np.int64]]
    page_reads: NDArray[np.int64]
    least_reads: NDArray[np.int64]
    lower_bound: int
    optimal: bool

    @property
    def stored_pages(self) -> int:
        """Number of pages, existing and new."""
        return self.existing_pages + len(self.pages)

    @property
    def read_amplification(self) -> NDArray[np.float64]:
        """Pages read / least possible, per model; 1.0 for a model without blocks."""
        return np.maximum(self.page_reads, 1) / np.maximum(self.least_reads, 1)

    def check(
        self, owners: Owners, existing: Owners | None = None, *, sizes: Sizes | None = None
    ) -> None:
        """Prove that the layout answers a request; independent of the packers.

        Every block of a model is on a page that the model reads, no page exceeds the capacity,
        holds a block twice, a block of nobody or one that an existing page has, and no model reads
        a page on which it owns nothing. With ``algorithm="layout"`` each block is stored once; with
        the others the new blocks of a model are exactly the union of the new pages it reads.

        Parameters
        ----------
        owners, existing, sizes
            As given to `pack`.

        Raises
        ------
        ArgumentError
            With the first violation, or when sizes are missing for a layout in bytes.
        """
        if self.in_bytes != (sizes is not None):
            unit = "bytes" if self.in_bytes else "blocks"
            raise ArgumentError(f"sizes must be given to check exactly when to pack (by {unit})")
        owner_indptr, owner_ids = _as_rows(owners, "owners")
        existing_indptr, existing_ids = _as_rows(() if existing is None else existing, "existing")
        if len(existing_indptr) - 1 != self.existing_pages:
            raise ArgumentError(
                f"layout violates its request: it counts {self.existing_pages} existing pages, "
                f"not {len(existing_indptr) - 1}"
            )
        _core.check_layout(
            owner_indptr,
            owner_ids,
            self.capacity,
            None if sizes is None else _as_sizes(sizes, owner_ids),
            existing_indptr,
            existing_ids,
            self.algorithm,
            *_as_rows(self.pages, "pages"),
            *_as_rows(self.reads, "reads"),
        )
        if self.page_reads.tolist() != [len(pages) for pages in self.reads]:
            raise ArgumentError("layout violates its request: page_reads do not count reads")
        if self.stored_pages < self.lower_bound:
            raise ArgumentError(
                f"layout violates its request: {self.stored_pages} pages are fewer than the lower "
                f"bound {self.lower_bound}"
            )


def pack(
    owners: Owners,
    capacity: int,
    *,
    sizes: Sizes | None = None,
    existing: Owners | None = None,
    algorithm: Algorithm = "layout",
    weights: ArrayLike | None = None,
) -> Layout:
    """Choose the pages for blocks that are shared between models.

    Parameters
    ----------
    owners
        Distinct block ids (>= 0) per model, or per tensor; see `Owners`. Order does not matter.
    capacity
        Blocks per page, or bytes per page when ``sizes`` is given.
    sizes
        Bytes per block, each 1 to ``capacity``; see `Sizes`.
    existing
        Pages already stored, as block ids in page order; ids that nobody owns may occur. They
        stay as they are: owners of their blocks read them, no new page holds such a block, and
        room left on them is not used, since a page once stored never changes. A block on several
        of them is read from where its owners read few pages.
    algorithm
        ``layout`` stores each block once, on as few pages as possible, and under that with the
        fewest page reads. The others are those of the paper: a model is exactly the union of its
        new pages, for which blocks may be stored several times. ``greedy1`` packs each
        equivalence class by itself; ``greedy2`` covers models from large to small with pages that
        lie inside them, and packs the rest by number of sharers; ``two_stage`` makes full pages
        of each class first and leaves the rest to ``greedy2``; ``baseline`` covers models in the
        order given.
    weights
        Per model how often it is called (finite, >= 0). ``layout`` minimises weighted page reads:
        up to 4 million (model, block) pairs they are never more than those of the layout without
        weights. The other algorithms do not look at them.

    Returns
    -------
    Layout
        The same for the same arguments on every machine.

    Raises
    ------
    ArgumentError
        When ids are negative or repeat within a model or page, a block is larger than a page, or
        sizes or weights do not fit the owners; the message names the argument.

    Notes
    -----
    Near-linear in the number of (model, block) pairs; releases the GIL. CSR pairs of contiguous
    int64 arrays are read where they are. Blocks of a class lie in id order over the pages, so one
    pass over a model in id order meets each of its pages in one stretch per class.

    How good ``layout`` is: with blocks of equal size the pages are always the fewest possible.
    Page reads are found by a heuristic; bench/RESULTS.md measures how good it is. Up to 32
    new blocks a search over all placements follows, which nearly always ends, and then pages and
    weighted reads are the least there can be, for blocks of unequal size too. Of larger problems
    those are optimal whose reads reach a lower bound. ``optimal`` says which it was. With more
    than 32 blocks of unequal size, pages are within one of the bound or no more than first fit
    needs.

    What the layout depends on: only the arguments, not on hash seeds, threads, the kernel in use
    or the order of ids within a set. Ids are names: renaming them in a way that keeps their order
    renames the layout. The order of the models decides between equals, but not the number of
    pages with blocks of equal size.

    ``two_stage``, ``greedy1``, ``greedy2`` and ``baseline`` follow Zhou et al., "Serving Deep
    Learning Models with Deduplication from Relational Databases", PVLDB 15(10), 2022; there a page
    that is not full is never read by a second model, here it is where that saves a page.
    """
    check_word("packing algorithm", algorithm, get_args(Algorithm))
    owner_indptr, owner_ids = _as_rows(owners, "owners")
    existing_indptr, existing_ids = _as_rows(() if existing is None else existing, "existing")
    page_capacity = as_count("capacity", capacity, least=1, most=2**63 - 1)
    indptr, page_ids, read_indptr, read_pages, least_reads, lower_bound, optimal = _core.pack_pages(
        owner_indptr,
        owner_ids,
        page_capacity,
        None if sizes is None else _as_sizes(sizes, owner_ids),
        existing_indptr,
        existing_ids,
        None if weights is None else _as_weights(weights, len(owner_indptr) - 1),
        algorithm,
    )
    page_reads = np.diff(read_indptr)
    for array in (page_ids, read_pages, page_reads, least_reads):
        array.flags.writeable = False
    return Layout(
        algorithm=algorithm,
        capacity=page_capacity,
        in_bytes=sizes is not None,
        existing_pages=len(existing_indptr) - 1,
        pages=_split(indptr, page_ids),
        reads=_split(read_indptr, read_pages),
        page_reads=page_reads,
        least_reads=least_reads,
        lower_bound=lower_bound,
        optimal=optimal,
    )


def _split(indptr: NDArray[np.int64], values: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [values[start:end] for start, end in itertools.pairwise(indptr.tolist())]


def _as_rows(rows: object, name: str) -> _Rows:
    if isinstance(rows, Mapping | str | bytes | np.ndarray) or not isinstance(rows, Sequence):
        raise ArgumentError(
            f"{name} must be a sequence of block id sets or a CSR pair (indptr, ids), not a "
            f"{type(rows).__name__}"
        )
    if isinstance(rows, tuple) and len(rows) == 2 and _is_csr(rows):
        indptr, ids = _as_integers(rows[0], f"indptr of {name}"), _as_integers(rows[1], name)
        if len(indptr) == 0:
            raise ArgumentError(f"indptr of {name} is empty; row pointers begin with 0")
        return indptr, ids
    parts = [_as_integers(row, f"{name}[{number}]") for number, row in enumerate(rows)]
    indptr = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=indptr[1:])
    return indptr, np.concatenate(parts) if parts else np.empty(0, np.int64)


def _is_csr(pair: Sequence[Any]) -> bool:
    return all(isinstance(part, np.ndarray) for part in pair)


def _as_integers(values: Any, name: str) -> NDArray[np.int64]:
    if isinstance(values, Collection) and not isinstance(values, np.ndarray | Sequence):
        try:  # four times as fast as a list; what it refuses is named below
            values = np.frombuffer(array_of("q", values), np.int64)
        except (TypeError, OverflowError):
            values = list(values)
    return as_integers(name, values, np.int64)


def _as_sizes(sizes: Sizes, owner_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    if isinstance(sizes, Mapping):
        ids = distinct(owner_ids).tolist()
        missing = next((block for block in ids if block not in sizes), None)
        if missing is not None:
            raise ArgumentError(f"sizes has no entry for block {missing}; give one per owned block")
        return _as_integers([sizes[block] for block in ids], "sizes")
    array = _as_integers(sizes, "sizes")
    # The core takes an empty array for no sizes at all.
    if len(array) == 0 and len(owner_ids) != 0:
        raise ArgumentError("sizes is empty; give one entry per distinct id, in ascending order")
    return array


def _as_weights(weights: ArrayLike, models: int) -> NDArray[np.float64]:
    given = as_array(weights, "weights")
    if given.dtype.kind not in "biuf":  # of complex numbers numpy would drop a part
        raise ArgumentError(f"weights must be real numbers, one per model, not {given.dtype}")
    array = np.require(given, np.float64, ["C", "A"])
    if array.shape != (models,):
        raise ArgumentError(f"weights has shape {array.shape} for {models} models; give one each")
    return array
