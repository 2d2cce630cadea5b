# SPDX-License-Identifier: Apache-2.0
"""For each block of a model, where it is at the destination, or how it gets there.

What an earlier model of this copy brought is known. A page that the destination has as it is,
byte by byte, is taken for that. Into an empty store, pages of which all blocks are wanted go whole
and unread. All other blocks are decoded, checked against their hash, and looked up by it, bytes
compared; what is new goes to the spool as it is encoded. A delta whose base the destination has,
but as a delta, cannot stay one on it: its tensor is read, and such blocks are matched as an add
would, by which they may be near to relatives, or have factors in common, as they had before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pydedup import codec, matmul
from pydedup.blocks import BlockMap, MatrixView
from pydedup.errors import CorruptStoreError
from pydedup.hashing import hash_keys, hash_view
from pydedup.ingest.aligned import Neighbours
from pydedup.ingest.families import Family
from pydedup.ingest.low_rank import Looks
from pydedup.ingest.match import LOOKUP_BLOCKS, Hints, Matcher
from pydedup.ingest.spool import NO_BASE, Spool
from pydedup.ingest.transposed import Transposed
from pydedup.layout import NO_PLACE, block_places, by_page, places_of, split_places
from pydedup.moving.known import Scope, Whereabouts
from pydedup.moving.pieces import Piece, stored_pieces
from pydedup.moving.source import End, SourceModel, recorded
from pydedup.moving.whole import WholePages
from pydedup.policies import Lossless
from pydedup.sets import distinct, find_among, in_parts, is_among
from pydedup.types import TensorInfo

__all__ = ["NotWholeError", "Resolved", "Resolver"]

_PAGES_AT_ONCE = 8


class NotWholeError(Exception):
    """Pages cannot be taken whole: a base of theirs is a delta at the destination."""

    def __init__(self, page_ids: NDArray[np.int64]) -> None:
        super().__init__(f"{len(page_ids)} pages cannot be taken whole")
        self.page_ids: list[int] = page_ids.tolist()


@dataclass(slots=True)
class Resolved:
    """Where the blocks of a model are or will be.

    Attributes
    ----------
    references
        Of each of the model's places, int64 (n,).
    whole
        The pages that go whole: per page, the numbers of its blocks on the spool, by slot.
    anew
        Whether some were matched anew.
    """

    references: NDArray[np.int64]
    whole: list[NDArray[np.int64]] = field(default_factory=list)
    anew: bool = False


class Resolver:
    """Resolves the blocks of one model. ``advance`` is told how many bytes are done."""

    def __init__(
        self,
        source: End,
        target: End,
        matcher: Matcher,
        spool: Spool,
        model: SourceModel,
        scope: Scope,
        advance: Callable[[int], None],
    ) -> None:
        self._source = source
        self._target = target
        self._matcher = matcher
        self._spool = spool
        self._model = model
        self._scope = scope
        self._advance = advance
        self._out = Resolved(np.full(len(model.places), NO_BASE, np.int64))

    def run(self) -> Resolved:
        """Resolve all blocks.

        Raises
        ------
        NotWholeError
            When some page must not go whole after all.
        CorruptStoreError
            When the source does not hold what it recorded.
        """
        out, model = self._out, self._model
        out.references[:] = self._scope.met.look_up(model.places)
        known = self._scope.known.look_up(model.places)
        is_known = (known.places != NO_PLACE) & (out.references == NO_BASE)
        self._refer(np.flatnonzero(is_known), known)
        if self._scope.twins:
            self._find_twins()
        rest = np.flatnonzero(out.references == NO_BASE)
        rows = recorded(self._source.adapter, distinct(split_places(model.places[rest])[0]))
        entries = rows.at(model.places[rest])  # also of pages that would go whole
        there = model.places[out.references != NO_BASE]
        whole = WholePages(self._source.adapter, rows, model.places, there, self._scope)
        self._list_whole(whole, deltas=False)
        single = ~is_among(split_places(model.places[rest])[0], list(whole.entries))
        rest, digests = rest[single], rows.digests[entries[single]]
        for some in in_parts(digests, LOOKUP_BLOCKS):
            self._matcher.look_up(hash_keys(some))
        is_delta = model.bases[rest] != NO_PLACE
        self._take(rest[~is_delta], digests[~is_delta], deltas=False)
        self._list_whole(whole, deltas=True)
        self._take(rest[is_delta], digests[is_delta], deltas=True)
        if (out.references == NO_BASE).any():
            out.anew = True
            self._match_anew()
        self._note_costs()
        return out

    # ---- what is there already ----------------------------------------------------------------

    def _refer(self, rows: NDArray[np.int64], found: Whereabouts) -> None:
        """Refer to blocks of the destination; ``found`` has an entry for each of the model's."""
        stored = self._matcher.stored
        some = found.take(rows)
        references = stored.references_at(some.places, some.costs)
        self._out.references[rows] = references
        deltas = np.flatnonzero(some.bases != NO_PLACE)
        bases = stored.references_at(some.bases[deltas], some.base_costs[deltas])
        stored.set_bases(references[deltas], bases)

    def _find_twins(self) -> None:
        """Refer to the blocks of pages that the destination has as they are."""
        places = self._model.places
        rest = np.flatnonzero(self._out.references == NO_BASE)
        page_ids = distinct(split_places(places[rest])[0]).tolist()
        twins = self._scope.twins
        pairs = [
            (row.id, twins[row.checksum])
            for row in (self._source.adapter.page_rows(ids=page_ids) if page_ids else ())
            if row.checksum in twins
        ]
        rows_of = dict(by_page(split_places(places[rest])[0]))
        found = Whereabouts.nowhere(len(places))
        for group in in_parts(pairs, _PAGES_AT_ONCE):
            for page_id, twin, page, bases in self._same_pages(group):
                rows = rest[rows_of[page_id]]
                slots = split_places(places[rows])[1]
                there = np.array([slot in bases for slot in slots.tolist()], np.bool_)
                rows, slots = rows[there], slots[there]
                found.places[rows] = block_places(np.full(len(rows), twin, np.int64), slots)
                found.bases[rows] = [bases[slot] for slot in slots.tolist()]
                found.costs[rows] = codec.page_cost(page.slots["length"])[slots]
                self._advance(page.nbytes)
        self._refer(np.flatnonzero(found.places != NO_PLACE), found)

    def _same_pages(
        self, pairs: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int, codec.Page, dict[int, int]]]:
        """Return those pairs of pages that are the same, and at which slots bases are whole.

        Per pair also the page itself and, by slot, the place of each block's base.
        """
        ours = dict(self._source.adapter.read_pages([page_id for page_id, _ in pairs]))
        theirs = dict(self._target.adapter.read_pages([twin for _, twin in pairs]))
        bases: dict[int, dict[int, int]] = {}
        rows = self._target.adapter.blocks_on_pages(list(theirs))
        for row in self._matcher.with_live_bases(rows):
            base = NO_PLACE if row.base_id is None else row.base_id
            bases.setdefault(row.page_id, {})[row.slot] = base
        return [
            (page_id, twin, codec.Page(ours[page_id]), bases.get(twin, {}))
            for page_id, twin in pairs
            if page_id in ours
            and ours[page_id] == theirs.get(twin)
            # Else both have another page there than their rows say.
            and self._scope.twins.get(codec.page_checksum(ours[page_id])) == twin
        ]

    # ---- pages that go whole ------------------------------------------------------------------

    def _list_whole(self, whole: WholePages, *, deltas: bool) -> None:
        """Put the blocks of whole pages on the spool's list: plain ones, or then the deltas."""
        if not whole.entries:
            return
        rows = whole.rows
        entries = np.concatenate(list(whole.entries.values()))
        chosen = entries[(rows.bases[entries] != NO_PLACE) == deltas]
        places = rows.places[chosen]
        page_ids, slots = split_places(places)
        bases = np.full(len(chosen), NO_BASE, np.int64)
        if deltas:
            bases = self._base_references(rows.bases[chosen])
            wrong = self._matcher.reader.bases_of(bases) != NO_BASE
            if wrong.any():
                raise NotWholeError(distinct(page_ids[wrong]))
        numbers = self._spool.list_blocks(page_ids, slots, rows.digests[chosen], bases)
        self._scope.met.spool(places)
        mine, is_mine = find_among(self._model.places, places)
        self._out.references[mine[is_mine]] = numbers[is_mine]
        if deltas:
            every = [rows.places[entries] for entries in whole.entries.values()]
            self._out.whole += [self._numbers(page) for page in every]

    def _numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers on the spool of blocks at these places, -1 where there is none."""
        spooled = self._scope.met.spooled()
        order = np.argsort(spooled, kind="stable")
        at, is_there = find_among(spooled[order], places)
        numbers = np.full(len(places), -1, np.int64)
        numbers[is_there] = order[at[is_there]]
        return numbers

    def _base_references(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return references of bases, by their places at the source."""
        model = self._model
        at, is_mine = find_among(model.places, places)
        references = self._out.references[at]
        others = np.flatnonzero(~is_mine)
        if len(others):  # of deltas that come along with the model
            references[others] = self._numbers(places[others])
            rest = others[references[others] < 0]
            references[rest] = self._scope.met.look_up(places[rest])
            rest = rest[references[rest] == NO_BASE]
            found = self._scope.known.look_up(places[rest])
            there = np.flatnonzero(found.places != NO_PLACE)
            references[rest[there]] = self._matcher.stored.references_at(
                found.places[there], found.costs[there]
            )
        lost = np.flatnonzero(references == NO_BASE)
        if len(lost):
            (page_id,), (slot,) = split_places(places[lost[:1]])
            raise CorruptStoreError(
                f"slot {slot} of page {page_id} is recorded as the base of a delta, which it is "
                "not; run verify on the store"
            )
        return references

    # ---- blocks one by one --------------------------------------------------------------------

    def _take(self, rows: NDArray[np.int64], digests: NDArray[np.uint64], *, deltas: bool) -> None:
        """Find or spool blocks of the model, which are all deltas, or none is."""
        page_ids, slots = split_places(self._model.places[rows])
        bases = split_places(self._model.bases[rows]) if deltas else None
        for at, piece in stored_pieces(self._source.pool, page_ids, slots, bases):
            self._take_piece(rows[at], digests[at], piece)

    def _take_piece(
        self, rows: NDArray[np.int64], digests: NDArray[np.uint64], piece: Piece
    ) -> None:
        """Find or spool blocks of one kind."""
        view = piece.read()
        wrong = np.flatnonzero((hash_view(view) != digests).any(axis=1))
        if len(wrong):
            page_ids, slots = split_places(self._model.places[rows[wrong]])
            raise CorruptStoreError(
                f"slot {slots[0]} of page {page_ids[0]} does not hold what was recorded for it; "
                "run verify on the store"
            )
        references = self._matcher.find(view, digests)
        base_references = np.full(len(rows), NO_BASE, np.int64)
        is_kept = np.ones(len(rows), np.bool_)  # others are matched anew
        if piece.bases is not None:
            base_references = self._base_references(self._model.bases[rows])
            on_delta = self._matcher.reader.bases_of(base_references) != NO_BASE
            is_kept = ~on_delta
        missing = np.flatnonzero((references == NO_BASE) & is_kept)
        while len(missing):
            # Of blocks that are equal the first is kept, and the others found.
            keys = hash_keys(digests[missing])
            first = missing[[keys.index(key) for key in dict.fromkeys(keys)]]
            references[first] = self._matcher.keep(
                view,
                first,
                piece.encoded(first),
                digests[first],
                base_references[first],
                piece.entries["base"][first].astype(np.uint64),
            )
            self._scope.met.spool(self._model.places[rows[first]])
            missing = missing[references[missing] == NO_BASE]
            if len(missing):
                references[missing] = self._matcher.find(view, digests)[missing]
                missing = missing[references[missing] == NO_BASE]
        self._out.references[rows] = references
        self._advance(int(codec.page_cost(piece.entries["length"]).sum()))

    def _match_anew(self) -> None:
        """Find or spool what is left: deltas on bases that are deltas at the destination."""
        model, looks = self._model, Looks()
        transposed = Transposed(self._matcher, model.stored.row, Lossless())
        for info, block_map in zip(model.stored.in_blocks, model.maps, strict=True):
            own = places_of(block_map)
            at = np.searchsorted(model.places, own)
            if (self._out.references[at] == NO_BASE).any():
                self._match_tensor_anew(info, block_map, at, looks, transposed)

    def _match_tensor_anew(
        self,
        info: TensorInfo,
        block_map: BlockMap,
        at: NDArray[np.int64],
        looks: Looks,
        transposed: Transposed,
    ) -> None:
        """Find or spool the blocks of a tensor that are left; ``at`` are the places of all."""
        matcher, grid, policy = self._matcher, block_map.grid, Lossless()
        known = self._out.references[at]
        left = np.flatnonzero(known == NO_BASE)
        # What the base is a delta on is near too.
        given = np.full(grid.count, NO_BASE, np.int64)
        bases = self._base_references(self._model.bases[at[left]])
        given[left] = matcher.reader.bases_of(bases)
        neighbours = matcher.aligned.neighbours(self._model.stored.row, info, grid)
        array = matmul.read(block_map, self._source.pool).reshape(info.shape)
        view = MatrixView.of(array, grid.block_shape, info.row_axes)
        by_transposition = transposed.of(info, grid)
        before = self._spool.count
        found = matcher.match(
            view,
            policy=policy,
            known=known,
            hints=Hints(
                aligned=_Given(given, neighbours),
                most=Family(matcher.reader, policy, neighbours, by_transposition),
                looks=looks,
                transposed=by_transposition,
            ),
        )
        made = self._spool.count - before
        self._scope.met.spool(np.full(made, NO_PLACE, np.int64))
        self._out.references[at] = found.references

    def _note_costs(self) -> None:
        """Look up what blocks of the destination take where that is not known yet."""
        references = self._out.references
        bases = self._matcher.reader.bases_of(references)
        stored = distinct(np.concatenate([references, bases[bases != NO_BASE]]))
        self._matcher.reader.learn(self._matcher.stored.without_cost(stored[stored < 0]))


@dataclass(frozen=True, slots=True)
class _Given:
    """Candidates that are known beforehand, and then others (a `ByPosition` of aligned.py)."""

    references: NDArray[np.int64]
    others: Neighbours

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return candidates of each of these blocks, the one that is known first."""
        return np.concatenate([self.references[numbers][np.newaxis], self.others(numbers)])

    def note(self, helped: NDArray[np.bool_]) -> None:
        """Remember which of the others were of help."""
        self.others.note(helped[1:])
