# SPDX-License-Identifier: Apache-2.0
"""What workers find out about blocks before it is their turn to be matched.

Whether a block is shared, and what it becomes a delta of, depends on all blocks before it, so one
thread decides that, in order. What depends on nothing else is done ahead of it:

1. large tensors are read and hashed;
2. blocks that nobody seems to have are encoded by themselves.

In between, the thread that decides asks the store about the hashes of several tensors at a time.
No decision rests on what was foreseen: a piece that comes out as expected is taken, any other is
looked at then. So a store is the same bit for bit whoever helped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pydedup.accuracy import Accuracy
from pydedup.blocks import MatrixView
from pydedup.formats.base import TensorEntry
from pydedup.hashing import hash_keys, hash_view
from pydedup.ingest.match import Matcher, look_now, pieces_of
from pydedup.ingest.plan import Request
from pydedup.ingest.similar import LookedAt, look_at
from pydedup.ingest.workers import Task, Workers
from pydedup.policies import Policy

__all__ = ["SMALL_BYTES", "Ahead"]

#: Tensors up to this size are read in their turn: that takes less than handing them over.
SMALL_BYTES = 256 * 1024
# Bytes of tensors that are read ahead, larger ones never are; and of what is made of blocks ahead,
# which is about twice what they take: their encoded bytes and a copy of each.
_READ_BYTES = 32 * 1024 * 1024
_MADE_BYTES = 16 * 1024 * 1024

_Tensor = tuple[MatrixView, NDArray[np.uint64]]


@dataclass(slots=True)
class _Coming:
    """A tensor that is read before its turn."""

    request: Request
    entry: TensorEntry
    task: Task[_Tensor]
    is_asked: bool = False
    #: Hashes of its blocks that nobody seems to have.
    fresh: frozenset[bytes] = frozenset()


@dataclass(slots=True)
class _Foreseen:
    """Pieces of a matrix that will be asked for, and what is made of the first ones."""

    view: MatrixView
    policy: Policy
    pieces: list[NDArray[np.int64]]
    begun: int = 0
    tasks: deque[Task[LookedAt]] = field(default_factory=deque)

    def made_bytes(self, number: int) -> int:
        """Return what all that comes of a piece takes, about."""
        grid = self.view.grid
        block_bytes = grid.block_rows * grid.block_cols * self.view.dtype.itemsize
        return 2 * block_bytes * len(self.pieces[number])

    def is_cut_into(self, pieces: Sequence[NDArray[np.int64]]) -> bool:
        """Whether these are its pieces."""
        return len(pieces) == len(self.pieces) and all(map(np.array_equal, pieces, self.pieces))


class Ahead:
    """Works ahead of a matcher of some models, in their order. Not thread-safe.

    With one worker, nothing is done ahead. A context manager.
    """

    def __init__(self, workers: Workers, requests: Sequence[Request], matcher: Matcher) -> None:
        self._workers = workers
        self._matcher = matcher
        self._has_version_before: dict[str, bool] = {}  # by name
        self._later = _large_tensors(requests) if workers.are_several else iter(())
        self._next = next(self._later, None)
        self._coming: deque[_Coming] = deque()
        self._read_bytes = 0
        self._fresh: set[bytes] = set()  # of all that are coming
        self._foreseen: list[_Foreseen] = []  # what is needed first comes first
        self._made_bytes = 0
        self._taken: MatrixView | None = None

    def read(
        self, request: Request, entry: TensorEntry
    ) -> tuple[MatrixView, NDArray[np.uint64] | None]:
        """Return a tensor, and its digests if they are known; the one before is done with."""
        if self._workers.are_several and entry.nbytes > SMALL_BYTES:
            self._forget(self._taken)
            self._top_up()
            if self._coming and self._coming[0].entry is entry:
                return self._take(self._coming.popleft())
            if self._next is not None and self._next[1] is entry:  # too large
                self._next = next(self._later, None)
                self._top_up()
        return request.read(entry.name), None

    def look(
        self, view: MatrixView, pieces: Sequence[NDArray[np.int64]], policy: Policy
    ) -> Iterator[LookedAt]:
        """Yield what `look_at` says of each of these pieces of a matrix."""
        if not self._workers.are_several or not policy.compresses:  # a mere copy
            yield from look_now(view, pieces, policy)
            return
        foreseen = next((some for some in self._foreseen if some.view is view), None)
        if foreseen is None or foreseen.policy != policy or not foreseen.is_cut_into(pieces):
            self._forget(view)
            foreseen = _Foreseen(view, policy, list(pieces))
            self._foreseen.insert(0, foreseen)
        for number, piece in enumerate(pieces):
            self._top_up()
            if foreseen.tasks:
                self._made_bytes -= foreseen.made_bytes(number)
                looked = foreseen.tasks.popleft().result()
            else:  # what others are to need has taken all room
                foreseen.begun = number + 1
                looked = look_at(view, piece, policy)
            yield looked
        self._forget(view)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Give up what nobody has begun."""
        self._next = None
        for tensor in self._coming:
            tensor.task.drop()
        self._coming.clear()
        for foreseen in list(self._foreseen):
            self._forget(foreseen.view)

    # ---- inside -------------------------------------------------------------------------------

    def _take(self, tensor: _Coming) -> _Tensor:
        self._read_bytes -= tensor.entry.nbytes
        self._fresh -= tensor.fresh
        view, digests = tensor.task.result()
        self._taken = view
        self._top_up()
        return view, digests

    def _forget(self, view: MatrixView | None) -> None:
        """Give up what was foreseen of a matrix and was not asked for."""
        for foreseen in [some for some in self._foreseen if some.view is view]:
            self._foreseen.remove(foreseen)
            done = foreseen.begun - len(foreseen.tasks)
            for number, task in enumerate(foreseen.tasks, done):
                task.drop()
                self._made_bytes -= foreseen.made_bytes(number)

    def _top_up(self) -> None:
        """Begin what there is room for."""
        while self._next is not None:
            request, entry = self._next
            if self._read_bytes + entry.nbytes > _READ_BYTES:
                break
            task = self._workers.submit(partial(_read, request, entry))
            self._coming.append(_Coming(request, entry, task))
            self._read_bytes += entry.nbytes
            self._next = next(self._later, None)
        self._ask()
        for foreseen in self._foreseen:
            while foreseen.begun < len(foreseen.pieces):
                made_bytes = foreseen.made_bytes(foreseen.begun)
                if self._made_bytes + made_bytes > _MADE_BYTES:
                    return
                piece = foreseen.pieces[foreseen.begun]
                work = partial(_look_at, foreseen.view, piece, foreseen.policy)
                foreseen.tasks.append(self._workers.submit(work))
                foreseen.begun += 1
                self._made_bytes += made_bytes

    def _ask(self) -> None:
        """Ask the store about what was read, and foresee which blocks will be encoded."""
        read: list[tuple[_Coming, MatrixView, list[bytes]]] = []
        for tensor in self._coming:
            if tensor.is_asked:
                continue
            if not tensor.task.is_ready:
                break
            tensor.is_asked = True
            if self._foresees(tensor.request):
                view, digests = tensor.task.result()
                if not self._matcher.met.has(digests):
                    read.append((tensor, view, hash_keys(digests)))
        if read:
            self._matcher.ask([key for _, _, keys in read for key in keys])
        for tensor, view, keys in read:
            fresh: dict[bytes, int] = {}
            for number, key in enumerate(keys):
                if key not in self._fresh and not self._matcher.is_known(key):
                    fresh.setdefault(key, number)
            tensor.fresh = frozenset(fresh)
            self._fresh |= tensor.fresh
            numbers = np.fromiter(fresh.values(), np.int64, len(fresh))
            pieces = list(pieces_of(view, numbers))
            self._foreseen.append(_Foreseen(view, tensor.request.policy, pieces))

    def _foresees(self, request: Request) -> bool:
        policy = request.policy
        if isinstance(policy, Accuracy) or not policy.compresses:
            return False
        # Of one with a version before, most blocks are known without a look at them.
        known = self._has_version_before
        if request.name not in known:
            rows = self._matcher.adapter.models(name=request.name, newest=1)
            known[request.name] = bool(rows)
        return not known[request.name]


def _large_tensors(requests: Sequence[Request]) -> Iterator[tuple[Request, TensorEntry]]:
    for request in requests:
        for entry, twin in request.distinct_entries():
            if twin is None and entry.nbytes > SMALL_BYTES:
                yield request, entry


def _read(request: Request, entry: TensorEntry, threads: int) -> _Tensor:
    view = request.read(entry.name)
    return view, hash_view(view, threads=threads)


def _look_at(view: MatrixView, piece: NDArray[np.int64], policy: Policy, threads: int) -> LookedAt:
    return look_at(view, piece, policy, threads=threads)
