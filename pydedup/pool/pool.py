# SPDX-License-Identifier: Apache-2.0
"""The buffer pool as all others see it.

Here: pinning, and calls of models, along which pages are read ahead. The pool itself is native;
which unpinned page is evicted, :mod:`pydedup.replacement` says. Deliberately not here: walking over
many blocks (:mod:`pydedup.pool.walks`), and what is done with the blocks of a page.

A `Page` is pinned for as long as anything refers to it. Pages are counted with their payload bytes,
and so are activations and what was reserved; the tables around pages (about 400 bytes each), block
maps and payloads on their way in are not.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from pydedup import _core
from pydedup._core import Page
from pydedup.arguments import as_count
from pydedup.errors import (
    ArgumentError,
    BudgetError,
    CorruptStoreError,
    PageNotFoundError,
    UnavailableError,
)
from pydedup.pool.admission import Held, Reservation, Shares
from pydedup.pool.loading import Copies, Fetch, PageLoader, ReadInto
from pydedup.pool.prefetch import Call, Room
from pydedup.pool.walks import Walks
from pydedup.replacement import DEFAULT_POLICY, Trace, check_policy
from pydedup.sets import distinct
from pydedup.windows import Plans, Window
from pydedup.words import Replacement

__all__ = ["Called", "Page", "PagePool"]

#: Says of pages who reads them, and what to do.
Explain: TypeAlias = Callable[[Sequence[int]], tuple[str, str]]

_T = TypeVar("_T")

_ADVICE = "; run verify on the store"

# A call within another one.
_PART: AbstractContextManager[None] = nullcontext()
# Models whose last walks are remembered.
_REMEMBERED_CALLS = 256
#: So many models are known to be known to the policy; then all are told anew when they are called.
_MOST_TOLD = 1 << 16
#: Pages that are expected to be as they were recorded before those are forgotten that are gone.
_MANY_EXPECTED = 1 << 16
# A block may need its page and that of its base. Who gets no more asks again for fewer.
_FEW_PAGES = 2
# For so long nothing is read ahead after no connection was to be had for it, which is waited for.
_PAUSE_SECONDS = 30.0


class Called(NamedTuple):
    """A model that is predicted with."""

    owner: int
    #: Changes when its pages do.
    state: int
    #: Returns its pages; called when the policy does not know them in this state.
    pages: Callable[[], NDArray[np.int64]]


class Keeper(Protocol):
    """What keeps reservations of a pool for later."""

    def give_up(self) -> bool:
        """Give up a reservation that is not in use, and return whether there was one."""

    def alone(self) -> AbstractContextManager[object]:
        """Wait for those that are in use, and let nobody begin with one as long as this lasts."""


class PagePool(Walks):
    """The pages of one store. Safe between threads; empty in a forked child.

    Parameters
    ----------
    fetch
        Reads pages; called without any lock held, by several threads at once.
    memory_bytes
        Bytes of pages to hold at most.
    explain
        Called with the ids of pages that are damaged or gone; what it returns, who reads them and
        what to do, follows on what the error says.
    policy
        Which page goes when room is needed: a name of `pydedup.replacement.POLICIES`.
    readers
        How many threads may fetch side by side for one call.
    scratch_bytes
        Beside the budget: bytes for activations before they are taken off it.
    copies
        Gives other copies of a page, for when the one that was read is damaged.
    read_into
        Reads pages without a copy, as far as that can be; ``fetch`` is asked for the rest.

    Attributes
    ----------
    outdated
        Whether pages were found to be of tables that are no more, so that it has to be made anew.

    Raises
    ------
    ArgumentError
        When the budget is not positive, or for an unknown policy.
    """

    def __init__(
        self,
        fetch: Fetch,
        memory_bytes: int,
        explain: Explain | None = None,
        *,
        policy: Replacement = DEFAULT_POLICY,
        readers: int = 1,
        scratch_bytes: int = 0,
        copies: Copies | None = None,
        read_into: ReadInto | None = None,
    ) -> None:
        if memory_bytes <= 0:
            raise ArgumentError(f"memory_bytes is {memory_bytes}; a pool needs a positive budget")
        self._fetch = fetch
        self._budget = memory_bytes
        check_policy(policy)
        self._policy = policy
        self._readers = readers
        self._copies = copies
        self._read_into = read_into
        self._explain = explain
        self.outdated = False
        self._expected: dict[int, bytes] = {}
        self._most_expected = _MANY_EXPECTED
        self._plans = Plans()
        self._wholes = Plans()
        self._shares = Shares(memory_bytes, scratch_bytes, lambda: self._loader.largest)
        self._start()
        _pools.add(self)

    def _start(self) -> None:
        """Begin with nothing in memory and nobody at work: at first, and in a forked child."""
        self._core = _core.BufferPool(self._budget, self._policy)
        self._loader = PageLoader(
            self._core,
            self._fetch,
            self.damaged,
            self._gone,
            self._readers,
            self._copies,
            self._read_into,
            self.is_expected,
        )
        self._keeper: Keeper | None = None
        self._shares.begin(self._core)
        self._calls = threading.local()
        self._last: dict[tuple[int, ...], list[list[Window]]] = {}  # walks of models' last call
        self._told: dict[int, int] = {}  # by model: which state of its pages the policy knows
        self._ahead_from = 0.0  # when pages may be read ahead (again)

    @property
    def memory_bytes(self) -> int:
        """The budget."""
        return self._budget

    @property
    def native(self) -> _core.BufferPool:
        """The pool itself, for kernels that pin pages on their own."""
        return self._core

    def pages(self, ids: Sequence[int] | NDArray[np.int64]) -> list[Page]:
        """Return these pages, pinned, in order.

        Parameters
        ----------
        ids
            Page ids, shape (n,); repeats are allowed.

        Raises
        ------
        PageNotFoundError
            When pages do not exist; the message lists them.
        BudgetError
            When the pages, with what is pinned otherwise, exceed the budget.
        CorruptStoreError
            When the bytes of a page are damaged.
        """
        wanted = np.ascontiguousarray(ids, np.int64)
        pages = self._core.pin(wanted)
        missing = {int(wanted[i]) for i, page in enumerate(pages) if page is None}
        if missing:
            loaded = self._load(sorted(missing), makes_room=len(wanted) <= _FEW_PAGES)
            pages = [
                loaded[number] if page is None else page
                for number, page in zip(wanted.tolist(), pages, strict=True)
            ]
        return pages  # type: ignore[return-value]  # no None is left

    def expect(
        self, tags: Mapping[int, bytes], there: Callable[[], Iterable[int]] | None = None
    ) -> list[int]:
        """Refuse other pages under these ids: those whose checksum does not begin so.

        A page never changes, and what was read of it before this was known is looked at again.
        Returns the ids under which other pages are expected already, which stays so. Of many pages,
        those are forgotten that ``there`` does not return, which is asked for all that there are.
        """
        known = self._expected
        new = [page_id for page_id in tags if page_id not in known]
        others = [page_id for page_id, tag in tags.items() if known.get(page_id, tag) != tag]
        if new:
            self._expected.update((page_id, tags[page_id]) for page_id in new)
            pages = zip(new, self._core.pin(np.array(new, np.int64), True), strict=True)
            other = [n for n, page in pages if page and not self.is_expected(n, page.checksum)]
            self.drop(other)
        if there is not None and len(known) > self._most_expected:
            # What other threads add from here on, they saw later than it is asked for.
            before = list(known)
            for page_id in set(before).difference(there()):
                known.pop(page_id, None)
            self._most_expected = max(2 * len(known), _MANY_EXPECTED)
        return others

    def expect_instead(self, tags: Mapping[int, bytes]) -> None:
        """Expect these pages from now on: what was recorded under their ids before is wrong."""
        self._expected.update(tags)
        self.drop(list(tags))

    def expected(self, page_id: int) -> bytes:
        """Return how the checksum of a page begins, as far as that is known."""
        return self._expected.get(page_id, b"")

    def is_expected(self, page_id: int, checksum: bytes) -> bool:
        """Whether a page may have this checksum, as far as that is known."""
        return checksum.startswith(self.expected(page_id))

    def warm(self, ids: Sequence[int] | NDArray[np.int64]) -> int:
        """Bring pages in, in order, as many as the budget holds; return how many are here."""
        wanted = distinct(np.ascontiguousarray(ids, np.int64))
        at, total, most = 0, 0, self.window_pages
        while at < len(wanted):
            free = self._budget - self._core.stats()["reserved_bytes"] - total
            count = min(most, free // self._loader.largest)
            if count < 1:
                break
            with self._shares.walks.hold(count * self._loader.largest):
                try:
                    total += sum(page.nbytes for page in self.pages(wanted[at : at + count]))
                except BudgetError:  # what others pin leaves less
                    most = count // 2
                    continue
            at += count
        return self._core.count_resident(wanted)

    def damaged(self, page_id: int, error: CorruptStoreError) -> CorruptStoreError:
        """Return the error that says of a damaged page who reads it, and what to do."""
        by, advice = self._explain((page_id,)) if self._explain else ("", _ADVICE)
        told = CorruptStoreError(f"page {page_id}: {error}{by}{advice}")
        told.page_ids = (page_id,)
        return told

    def _gone(self, page_ids: Sequence[int]) -> PageNotFoundError:
        """Return the error about pages that are not there.

        Where a model reads them they are lost. Else a vacuum took them away, or who removed it.
        """
        by, advice = self._explain(page_ids) if self._explain else ("", "")
        return PageNotFoundError.of(page_ids, by + advice if by else "")

    def call(self, *models: Called) -> AbstractContextManager[None]:
        """Make what this thread does one prediction, of one model or of several together.

        Their rates and pages count when others have to go, and pages are read ahead along the way
        that the last call of these models took. Within another call of this thread it is part of
        that.
        """
        return self._begun(models) if self._calling() is None else _PART

    def count_call(self, model: Called) -> None:
        """Count a prediction of one model that read nothing, and so needed no `call`."""
        if self._calling() is None:
            self._count((model,))

    def _count(self, models: Sequence[Called]) -> None:
        for model in models:
            if self._told.get(model.owner) != model.state:
                self._core.owns(model.owner, model.pages())
                if len(self._told) >= _MOST_TOLD:
                    self._told.clear()
                self._told[model.owner] = model.state
            if not self._core.call(model.owner):  # not called for so long that it was forgotten
                self._core.owns(model.owner, model.pages())

    @contextmanager
    def _begun(self, models: Sequence[Called]) -> Iterator[None]:
        self._count(models)
        owner = tuple(sorted(model.owner for model in models))
        core = self._core
        call = Call(self._last.get(owner, []), self._load_ahead, self._room_ahead)
        self._calls.now = call
        try:
            yield
        finally:
            self._calls.now = None
            if self._core is core:  # else in a forked child, where nobody reads for it
                call.end()
                if call.walks:  # else all was there
                    self._last.pop(owner, None)
                    self._last[owner] = call.walks
                    for oldest in list(self._last)[:-_REMEMBERED_CALLS]:
                        self._last.pop(oldest, None)

    def reserve(self, nbytes: int) -> Reservation:
        """Take bytes off the budget; see `pydedup.pool.admission.Shares.reserve`."""
        return self.with_room(lambda: self._reserve(nbytes))

    def reserve_free(self, nbytes: int) -> Reservation | None:
        """Do what `reserve` does where pages alone have to give way; else return ``None``."""
        try:
            return self._shares.reserve(nbytes)
        except BudgetError:
            return None

    def keeps(self, keeper: Keeper) -> None:
        """Have something asked for room where there is none, that keeps reservations for later.

        It must not refer to this pool.
        """
        self._keeper = keeper

    def with_room(self, use: Callable[[], _T]) -> _T:
        """Use the budget; where it does not allow that, once more with nobody beside.

        That is, with no walk and no user of the keeper. The thread must hold no page meanwhile:
        they may wait for it.
        """
        try:
            return use()
        except BudgetError:
            if self._keeper is None:
                raise
        # Not in the handler: the exception would keep pages pinned.
        walks = self._shares.walks
        with self._keeper.alone(), walks.hold(walks.limit):
            return use()

    @property
    def activation_bytes(self) -> int:
        """What activations may take together, in bytes."""
        return self._shares.activation_bytes

    def activations(self, nbytes: int, *, waits: bool = True) -> Held:
        """Count activations; see `pydedup.pool.admission.Shares.activations`."""
        return self._shares.activations(nbytes, waits=waits)

    def record(self, max_uses: int) -> None:
        """Record uses of pages from now on, at 16 bytes each; 0 ends that.

        Raises BudgetError when there is no memory for so many; what was recorded stays.
        """
        uses = as_count("max_uses", max_uses, most=2**32 - 1)
        try:
            self._core.record(uses)
        except MemoryError as exc:
            raise BudgetError(
                f"no memory to record {uses} uses of pages, at 16 bytes each; lower max_uses"
            ) from exc

    def recorded(self) -> Trace:
        """Return what was recorded so far."""
        return Trace(*self._core.recorded())

    def stats(self) -> dict[str, int]:
        """Return the pool in numbers.

        These are hits, misses, inserts, evictions, pages, bytes (of pages and what is kept
        decoded of them), decoded_bytes, pinned_bytes, reserved_bytes, budget_bytes, waits (walks
        that had to wait for pages) and wait_us (microseconds of that).
        """
        loader = self._loader
        return {
            **self._core.stats(),
            "waits": loader.waits,
            "wait_us": round(loader.waited * 1e6),
        }

    def drop(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        """Forget these pages; those in use go when their last user is done."""
        self._core.drop(np.ascontiguousarray(ids, np.int64))

    def clear(self) -> None:
        """Forget all pages; those in use go when their last user is done."""
        self._core.clear()

    # ---- inside -------------------------------------------------------------------------------

    def _load(self, missing: list[int], *, makes_room: bool) -> dict[int, Page]:
        while True:
            try:
                return self._loader.load(missing, side_by_side=self._calling() is not None)
            except BudgetError:
                if not makes_room or not self._make_room():
                    raise

    def _reserve(self, nbytes: int) -> Reservation:
        while True:
            try:
                return self._shares.reserve(nbytes)
            except BudgetError:
                if not self._make_room():
                    raise

    def _make_room(self) -> bool:
        return self._keeper is not None and self._keeper.give_up()

    def _calling(self) -> Call | None:
        call: Call | None = getattr(self._calls, "now", None)
        return call

    def _room_ahead(self) -> Room | None:
        """Take room for pages that a call reads ahead, if there is some."""
        # However small the pool, a window may be two pages, a block's and its base's. Those of a
        # walk and those ahead of it fit beside activations from eight pages on; in less there is
        # no room to read ahead.
        pages = max(2, self._ahead_pages)
        nbytes, gate = pages * self._loader.largest, self._shares.ahead
        return Room(pages, lambda: gate.give_back(nbytes)) if gate.try_take(nbytes) else None

    def _load_ahead(self, ids: NDArray[np.int64]) -> list[Page]:
        """Return pages, pinned, read before their use; on a thread that reads for a call.

        None for a while after that needed a connection which the database does not give: the one
        that the call has may do without.
        """
        if time.monotonic() < self._ahead_from:
            return []
        pages = self._core.pin(ids, True)
        missing = [int(ids[i]) for i, page in enumerate(pages) if page is None]
        try:
            loaded = self._loader.load(missing, ahead=True, side_by_side=True)
        except UnavailableError:
            self._ahead_from = time.monotonic() + _PAUSE_SECONDS
            raise
        return [page for page in pages if page is not None] + list(loaded.values())


# ---- fork ---------------------------------------------------------------------------------------
# A child starts with new, empty pools: the threads that were filling the old ones, or waiting at
# their gates, do not exist there. Pages that the forking thread itself holds stay valid.

_pools: weakref.WeakSet[PagePool] = weakref.WeakSet()


def _restart_pools() -> None:
    for pool in list(_pools):
        pool._start()


os.register_at_fork(after_in_child=_restart_pools)
