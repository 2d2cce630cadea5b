# SPDX-License-Identifier: Apache-2.0
"""For each block of each model, where it already is, or how it will be kept.

A block is looked for in its own tensor, in the blocks of this batch, and in the store, by hash;
bytes are compared before anything is shared. What is found nowhere may be near to another block
(similar.py); what is new goes to the spool. References are those of places.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import LIVE, Adapter, BlockRow
from pydedup.adapter_options import only_sound_rows
from pydedup.blocks import MatrixView
from pydedup.codec import EncodedBlocks
from pydedup.hashing import hash_keys, hash_view
from pydedup.ingest.aligned import Aligned
from pydedup.ingest.asked import ByPosition, ByTransposition, Nobody
from pydedup.ingest.by_hash import ByHash, leaders_of
from pydedup.ingest.candidates import Candidates, can_be_delta
from pydedup.ingest.deltas import Delta
from pydedup.ingest.low_rank import Looks, LowRankRelatives, Moved, edges_together
from pydedup.ingest.met import MetTensors
from pydedup.ingest.places import BlockReader, in_pieces
from pydedup.ingest.scan import PageScan
from pydedup.ingest.similar import LookedAt, Similar, look_at
from pydedup.ingest.spool import NO_BASE, Spool
from pydedup.ingest.stored_index import KeptIndex
from pydedup.ingest.stored_models import StoredModels
from pydedup.ingest.stored_table import StoredTable
from pydedup.layout import split_places
from pydedup.policies import Policy
from pydedup.pool import PagePool
from pydedup.sets import in_parts, is_among, without

__all__ = ["LOOKUP_BLOCKS", "Hints", "Matched", "Matcher", "look_now", "pieces_of"]

#: Blocks whose hashes are looked up in one go.
LOOKUP_BLOCKS = 8192


def pieces_of(view: MatrixView, numbers: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Cut a list of blocks into what is encoded in one go."""
    grid = view.grid
    shape = min(grid.block_rows, grid.rows), min(grid.block_cols, grid.cols)
    return in_pieces(numbers, view.dtype, shape)


def _looked_up_together(
    view: MatrixView, numbers: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    """Cut a list of blocks, ascending, into what is looked up in one go.

    If possible not within those that low_rank.py looks at together: of the halves of these neither
    might be enough.
    """
    start = 0
    while start < len(numbers):
        stop = min(start + LOOKUP_BLOCKS, len(numbers))
        if stop < len(numbers):
            edges = edges_together(view)
            last = edges[np.searchsorted(edges, numbers[stop], side="right") - 1]
            edge = int(np.searchsorted(numbers, last))
            stop = edge if edge > start else stop
        yield numbers[start:stop]
        start = stop


def look_now(
    view: MatrixView, pieces: Sequence[NDArray[np.int64]], policy: Policy
) -> Iterator[LookedAt]:
    """Look at pieces of a matrix as they are asked for."""
    return (look_at(view, piece, policy) for piece in pieces)


@dataclass(slots=True)
class Matched:
    """The blocks of one matrix.

    Attributes
    ----------
    references
        Where each block is, int64 (n,).
    digests
        Of the source's blocks, uint64 (n, 2).
    errors
        Relative L2 difference of each block to what is stored for it, float64 (n,); 0 where that
        was known before.
    """

    references: NDArray[np.int64]
    digests: NDArray[np.uint64]
    errors: NDArray[np.float64]


_NOBODY = Nobody()


@dataclass(frozen=True, slots=True)
class Hints:
    """What is known of a matrix before its blocks are looked at.

    Attributes
    ----------
    aligned
        What gives candidates by position (aligned.py).
    deltas
        What some blocks are to be, unless an identical one is stored, by number; under a policy
        that keeps bits.
    most
        What says how much of blocks of the matrix that are new deltas on others may take, at most;
        else they are kept by themselves, as bases of others (families.py).
    moved
        What moves the bases of blocks, as far as that was looked for before (low_rank.py).
    looks
        For adapters that were merged into tensors of the model; `None` of a matrix that is blocks
        of several tensors, which no factors have in common.
    transposed
        What gives bases to transpose (transposed.py).
    """

    aligned: ByPosition = _NOBODY
    deltas: Mapping[int, Delta] = field(default_factory=dict)
    most: Callable[[MatrixView, NDArray[np.int64]], float] | None = None
    moved: Mapping[int, Moved] = field(default_factory=dict)
    looks: Looks | None = field(default_factory=Looks)
    transposed: ByTransposition | None = None


_NO_HINTS = Hints()

_Look = Callable[[MatrixView, Sequence[NDArray[np.int64]], Policy], Iterator[LookedAt]]


class Matcher:
    """Matches the tensors of one batch, in order. Not thread-safe.

    Pages of the store that are ``unreadable`` are nothing that blocks are shared with. ``kept`` is
    what an add before this one left of the similarity index, ``models`` what it read of models.
    Unless it ``keeps_bases``, no block is kept by itself where a delta takes less, as a base of
    later ones (families.py).

    Attributes
    ----------
    adapter, pool
        The store.
    models
        The models of it that are compared with.
    spool
        What it does not have.
    look
        What looks at pieces of a matrix (`look_now`); may have done so ahead of time (ahead.py).
    kept_bases
        Whether blocks were kept as bases of later ones.
    """

    def __init__(
        self,
        adapter: Adapter,
        pool: PagePool,
        spool: Spool,
        unreadable: Collection[int] = (),
        kept: KeptIndex | None = None,
        models: StoredModels | None = None,
        *,
        keeps_bases: bool = True,
    ) -> None:
        self.adapter = adapter
        self.pool = pool
        self.spool = spool
        self.stored = StoredTable(unreadable)
        self.reader = BlockReader(PageScan(adapter, pool), spool, self.stored)
        self.candidates = Candidates(adapter, pool, self.stored, kept)
        self.similar = Similar(self.reader, self.candidates)
        self.models = StoredModels(adapter, pool) if models is None else models
        self.met = MetTensors(self.reader)
        self.aligned = Aligned(self.models, self.stored, self.reader)
        self._known = ByHash()
        self._looked_up: set[bytes] = set()
        # What the store said about hashes that were asked about, but not looked up yet.
        self._answers: dict[bytes, tuple[BlockRow, ...]] = {}
        self.look: _Look = look_now
        self._keeps_bases = keeps_bases
        self.kept_bases = False

    def match(
        self,
        view: MatrixView,
        *,
        policy: Policy,
        digests: NDArray[np.uint64] | None = None,
        known: NDArray[np.int64] | None = None,
        hints: Hints = _NO_HINTS,
        advance: Callable[[int], None] | None = None,
    ) -> Matched:
        """Find or keep each block of a matrix.

        ``known`` are references of blocks that need no look, `NO_BASE` for others.
        """
        if digests is None:
            digests = hash_view(view)
        references = np.full(len(digests), NO_BASE, np.int64) if known is None else known.copy()
        sizes = view.block_bytes()
        changed = np.flatnonzero(references == NO_BASE)
        if advance is not None and len(changed) < len(sizes):
            advance(int(sizes.sum() - sizes[changed].sum()))
        matched = Matched(references, digests, np.zeros(len(digests)))
        relatives = None
        for some in _looked_up_together(view, changed):
            fresh = self._find(view, digests, some, references)
            relatives = self._keep(view, fresh, matched, policy, hints, relatives)
            if advance is not None:
                advance(int(sizes[some].sum()))
        return matched

    def find(self, view: MatrixView, digests: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return references of blocks that are identical to known ones, else `NO_BASE`."""
        references = np.full(len(digests), NO_BASE, np.int64)
        for some in in_parts(np.arange(len(digests)), LOOKUP_BLOCKS):
            self._find(view, digests, some, references)
        return references

    def keep(
        self,
        view: MatrixView,
        indices: NDArray[np.int64],
        encoded: EncodedBlocks,
        digests: NDArray[np.uint64],
        bases: NDArray[np.int64],
        base_tags: NDArray[np.uint64],
    ) -> NDArray[np.int64]:
        """Keep blocks of a matrix as they are encoded; returns their references. See `Spool`."""
        numbers = self.spool.count + np.arange(len(indices), dtype=np.int64)
        self.spool.append(view, indices, encoded, digests, bases, base_tags)
        for key, number in zip(hash_keys(digests), numbers.tolist(), strict=True):
            self._known.add(key, number)
        return numbers

    def _find(
        self,
        view: MatrixView,
        digests: NDArray[np.uint64],
        indices: NDArray[np.int64],
        references: NDArray[np.int64],
    ) -> dict[bytes, list[int]]:
        """Refer to blocks that some are identical to; return the others, by hash."""
        keys = hash_keys(digests[indices])
        self.look_up(keys)
        return self._resolve(view, dict(zip(indices.tolist(), keys, strict=True)), references)

    def look_up(self, keys: list[bytes]) -> None:
        """Make the blocks of the store with these hashes known, in an order that is theirs."""
        unknown = [key for key in dict.fromkeys(keys) if key not in self._looked_up]
        self.ask(unknown)
        self._looked_up.update(unknown)
        rows = [row for key in unknown for row in sorted(self._answers.pop(key), key=_place)]
        for row, reference in zip(rows, self.stored.references(rows), strict=True):
            # Stored blocks first: sharing with the store beats sharing within the batch.
            self._known.add(row.hash128, reference, first=True)

    def ask(self, keys: Sequence[bytes]) -> None:
        """Ask the store about hashes that it was not asked about before."""
        unknown = [
            key
            for key in dict.fromkeys(keys)
            if key not in self._looked_up and key not in self._answers
        ]
        self._answers.update(dict.fromkeys(unknown, ()))
        with only_sound_rows(self.adapter):  # what others hold is nothing that can be shared
            rows = self.with_live_bases(self.adapter.find_blocks(unknown))
        for row in rows:
            self._answers[row.hash128] += (row,)

    def is_known(self, key: bytes) -> bool:
        """Whether a block with this hash was met, or is in the store as far as that was asked."""
        return key in self._known or bool(self._answers.get(key))

    def with_live_bases(self, rows: Sequence[BlockRow]) -> list[BlockRow]:
        """Leave out deltas whose base is on no live page, and what cannot be read.

        A page may be kept for other blocks than a delta whose last user is gone; then nobody keeps
        the base, and who shared the delta would lose it.
        """
        unreadable = set(self.stored.unreadable.tolist())
        rows = [row for row in rows if row.page_id not in unreadable]
        places = np.array([row.base_id for row in rows if row.base_id is not None], np.int64)
        if not len(places):
            return rows
        pages = without(split_places(places)[0], self.stored.unreadable).tolist()
        live = [page.id for page in self.adapter.page_rows(ids=pages, state=LIVE)]
        readable = set(places[is_among(split_places(places)[0], live)].tolist())
        return [row for row in rows if row.base_id is None or row.base_id in readable]

    def _resolve(
        self,
        view: MatrixView,
        keys: Mapping[int, bytes],
        references: NDArray[np.int64],
    ) -> dict[bytes, list[int]]:
        """Refer to identical blocks; return those of ``keys`` that have none, by hash."""
        pending = list(keys)
        fresh: dict[bytes, list[int]] = {}
        attempt = 0
        while pending:
            candidates = [self._known.get(keys[i], attempt) for i in pending]
            indices, chosen = [], []
            for i, candidate in zip(pending, candidates, strict=True):
                if candidate is None:
                    fresh.setdefault(keys[i], []).append(i)
                else:
                    indices.append(i)
                    chosen.append(candidate)
            at, found = np.array(indices, np.int64), np.array(chosen, np.int64)
            same = self.reader.equal(view, at, found)
            references[at[same]] = found[same]
            pending = at[~same].tolist()
            attempt += 1
        return fresh

    def _keep(
        self,
        view: MatrixView,
        fresh: dict[bytes, list[int]],
        matched: Matched,
        policy: Policy,
        hints: Hints,
        relatives: LowRankRelatives | None,
    ) -> LowRankRelatives:
        """Keep the distinct ones of ``fresh``, in block order.

        ``relatives`` is what this returned for other blocks of the matrix.
        """
        leader_of = leaders_of(fresh, view.block)
        leaders = np.array(sorted(set(leader_of.values())), np.int64)
        takes_deltas = policy.uses_deltas and can_be_delta(view.grid.block_shape)
        most = 1.0
        if takes_deltas and self._keeps_bases and hints.most is not None:
            most = hints.most(view, leaders)
            self.kept_bases |= most < 1
        neighbours = hints.aligned if takes_deltas else _NOBODY
        if relatives is None:
            relatives = LowRankRelatives(
                self.reader,
                view,
                leaders,
                policy,
                neighbours,
                hints.moved,
                hints.looks,
                hints.transposed if takes_deltas else None,
            )
        else:
            relatives.turn_to(leaders)
        pieces = list(pieces_of(view, leaders))
        for piece, looked in zip(pieces, self.look(view, pieces, policy), strict=True):
            moved = list(relatives.of(piece)) if most == 1 and hints.looks is not None else []
            self._keep_piece(view, piece, looked, matched, policy, hints, neighbours, moved, most)
        for i, leader in leader_of.items():
            matched.references[i] = matched.references[leader]
            matched.errors[i] = matched.errors[leader]
        return relatives

    def _keep_piece(
        self,
        view: MatrixView,
        piece: NDArray[np.int64],
        looked: LookedAt,
        matched: Matched,
        policy: Policy,
        hints: Hints,
        neighbours: ByPosition,
        moved: Sequence[tuple[NDArray[np.int64], Moved]],
        most: float,
    ) -> None:
        aligned = neighbours(piece)
        kept = self.similar.keep(
            looked,
            piece,
            matched.digests[piece],
            policy,
            aligned=aligned,
            deltas=hints.deltas,
            moved=moved,
            most=most,
            transposed=hints.transposed,
        )
        # What a lossy delta holds may be there: the same source was added before, as such a delta.
        # Or another of the piece holds it: the two differed by no more than was rounded away.
        fresh: dict[bytes, list[int]] = {}
        held: dict[int, NDArray[Any]] = {}
        for at, content in kept.lossy:
            found = np.full(len(at), NO_BASE, np.int64)
            missed = self._find(content, kept.digests[at], np.arange(len(at)), found)
            kept.shared[at[found != NO_BASE]] = found[found != NO_BASE]
            for key, blocks in missed.items():
                fresh.setdefault(key, []).extend(at[blocks].tolist())
                held.update((int(at[i]), content.block(i)) for i in blocks)
        first_of = np.arange(len(piece))
        for i, first in leaders_of(fresh, held.__getitem__).items():
            first_of[i] = first
        if most == 1:  # else they are relatives, who might have helped
            helped = (aligned == kept.bases) | (aligned == kept.shared)
            neighbours.note(helped & (aligned != NO_BASE))
        is_new = kept.shared == NO_BASE
        matched.references[piece[~is_new]] = kept.shared[~is_new]
        new = np.flatnonzero(is_new & (first_of == np.arange(len(piece))))
        numbers = self.keep(
            view,
            piece[new],
            kept.encoded.select(new),
            kept.digests[new],
            kept.bases[new],
            kept.base_tags[new],
        )
        spooled = np.full(len(piece), NO_BASE, np.int64)
        spooled[new] = numbers
        matched.references[piece[is_new]] = spooled[first_of[is_new]]
        self.similar.add(kept, spooled)
        matched.errors[piece] = kept.errors


def _place(row: BlockRow) -> tuple[int, int]:
    return row.page_id, row.slot
