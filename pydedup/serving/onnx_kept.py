# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime has ready of a store: graphs, sessions, and tensors in memory.

All of it is counted against the memory budget. What was not used for longest makes room for
others, and for pages: sessions that have weights inside first, then tensors, then sessions with
much inside of their models, where weights of 4 bits are. Deliberately not here: a call
(:mod:`pydedup.serving.onnx_session`), and how such sessions are made
(:mod:`pydedup.serving.onnx_own`).
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pydedup._memory import give_back_freed
from pydedup.blocks import BlockMap
from pydedup.catalog import StoredModel
from pydedup.errors import BudgetError, PydedupError, UnsupportedFormatError
from pydedup.formats.onnx_inputs import OpenedGraph, open_graph
from pydedup.pool import PagePool, Reservation
from pydedup.pool.admission import Gate
from pydedup.serving.engine import Tensors
from pydedup.serving.onnx_own import Own, make_own
from pydedup.serving.onnx_values import (
    as_value,
    import_onnxruntime,
    inputs_and_outputs,
    never_end,
    new_session,
)
from pydedup.serving.tensor import StoredTensor

__all__ = ["Held", "Runner", "Session", "content_key", "opened_graph", "runner_of"]

#: Graphs that are kept ready, and sessions; the weights are not in them.
_KEPT = 64
#: Sessions that have weights inside take this part of the budget at most.
_OWN_PART = 2
#: Calls of a model until such a session, for which there was no room, is tried again; each time
#: that is for nothing, four times as many.
_CALLS_UNTIL_AGAIN = 64
#: Calls in vain, without others in need of room, after which that part of the budget grows again.
_CALLS_OF_CALM = 256
#: Sessions make room for others when they take this; smaller ones are no help to speak of.
_LARGE_BYTES = 1 << 20
#: Calls that may be under way at once: more than there are threads.
_CALLS = 1 << 20


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in memory, as the runtime takes it."""

    value: Any
    array: NDArray[Any]
    reservation: Reservation


@dataclass(slots=True)
class _Turn:
    """When a session with the weights of a model is tried next: after so many more calls of it."""

    calls: float = 1  # of its first call nobody knows whether there will be others
    again: float = _CALLS_UNTIL_AGAIN

    def wait(self) -> None:
        self.calls, self.again = self.again, self.again * 4


@dataclass(frozen=True, slots=True)
class Session:
    """A session of the runtime, its inputs by name, and the types of its outputs."""

    runtime: Any
    kinds: Mapping[str, Any]
    outputs: Mapping[str, str]
    reservation: Reservation


_T = TypeVar("_T")


class Runner:
    """The sessions and loaded tensors of one store. Safe between threads.

    It refers neither to the store nor to its pool, which it must not keep alive.
    """

    def __init__(self) -> None:
        #: Where calls are under way, each of which keeps its weights.
        self.calls = Gate(_CALLS)
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        #: By model: its graph, and which session runs it.
        self._models: OrderedDict[int, tuple[OpenedGraph, bytes]] = OrderedDict()
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()
        self._held: OrderedDict[bytes, Held] = OrderedDict()
        #: By model; of those that were asked, when they may get one; the most bytes.
        self._own: OrderedDict[int, Own[Held]] = OrderedDict()
        self._turns: OrderedDict[int, _Turn] = OrderedDict()
        self._most_own: int | None = None
        self._calm = 0  # calls since others needed room

    def heir(self) -> Runner:
        """Return what a forked child has of this: the weights, which are in its memory, too.

        Sessions are not given back, ever: their threads do not exist there, and ending them would
        wait for these. What they have in memory is the parent's.
        """
        sessions: list[Session | Own[Held]] = [*self._sessions.values(), *self._own.values()]
        for session in sessions:
            never_end(session.runtime)
            session.reservation.release()
        heir = Runner()
        heir._held = self._held
        return heir

    def knows(self, number: int) -> bool:
        """Return whether a model was run, so that its graph need not be read."""
        with self._lock:
            return number in self._models or number in self._own

    def own(self, number: int) -> Own[Held] | None:
        """Return the session that has the weights of a model inside, if there is one."""
        with self._lock:
            own = self._own.get(number)
            if own is not None:
                self._own.move_to_end(number)
            return own

    def make_own(
        self,
        model: StoredModel,
        shared: Session,
        opened: Callable[[], OpenedGraph],
        held: Mapping[str, Held],
        tables: frozenset[str],
        pool: PagePool,
    ) -> Own[Held] | None:
        """Make such a session, unless this is the first call of the model, or there is no room.

        Without room it is tried again many calls later, and never when the runtime takes no
        constants. ``shared`` is the one that runs it now, ``opened`` returns its graph anew.
        """
        number = model.row.id
        inside = {name: one for name, one in held.items() if name not in tables}
        nbytes = shared.reservation.nbytes + sum(one.array.nbytes for one in inside.values())
        with self._lock:
            turn = self._turns.setdefault(number, _Turn())
            _shorten(self._turns)
            turn.calls -= 1
            if turn.calls >= 0 or not inside or nbytes > self._left_for_own(pool):
                return None
            turn.wait()  # also for others that call it now
        values = {name: one.value for name, one in inside.items()}
        try:
            graph = opened()  # it may wait for others, who may want to load something
        except BudgetError:  # no room for its pages beside what runs now
            return None
        with self._loading:
            known = self.own(number)
            if known is not None:  # another thread was faster
                return known
            try:
                own = make_own(graph, held, values, nbytes, new_session, pool)
            except Exception:  # of many classes; it runs as it did
                turn.calls, own = math.inf, None
            if own is not None:
                with self._lock:
                    self._turns[number] = _Turn()
                    self._own[number] = own
                    _shorten(self._own)
                _give_back_after(nbytes)  # what the runtime laid out and had before
            return own

    def _left_for_own(self, pool: PagePool) -> int:
        """Return how many bytes such a session may have; with the lock."""
        whole = pool.memory_bytes // _OWN_PART
        self._calm += 1
        if self._most_own is None:
            self._most_own = whole
        elif self._most_own < whole and self._calm >= _CALLS_OF_CALM:
            self._most_own, self._calm = min(max(2 * self._most_own, _LARGE_BYTES), whole), 0
        return self._most_own - sum(own.reservation.nbytes for own in self._own.values())

    def graph(
        self,
        model: StoredModel,
        payload: Callable[[], bytes],
        tensor: Tensors,
        pool: PagePool,
    ) -> tuple[OpenedGraph, Session]:
        """Return the graph of a model, and the session that all models with the same one share."""
        number = model.row.id
        with self._lock:
            graph, key = self._models.get(number, (None, b""))
            session = self._sessions.get(key)
            if graph is not None and session is not None:
                self._models.move_to_end(number)
                self._sessions.move_to_end(key)
                return graph, session
        import_onnxruntime()
        graph = opened_graph(model, payload, tensor)
        key = hashlib.blake2b(graph.model, digest_size=16).digest()
        session = self._session(key, graph, model.address, pool)
        graph = replace(graph, model=b"")
        with self._lock:
            self._models[number] = graph, key
            _shorten(self._models)
        return graph, session

    def tensor(self, block_map: BlockMap, stored: StoredTensor, kind: int, pool: PagePool) -> Held:
        """Return a tensor in memory, loaded unless this or another model has the same one."""
        key = content_key(block_map, stored.shape)
        with self._loading:  # by one thread at a time: two would need the room twice
            with self._lock:
                held = self._held.get(key)
                if held is not None:
                    self._held.move_to_end(key)
                    return held
            n_bytes = math.prod(stored.shape) * stored.dtype.itemsize
            read = functools.partial(stored.numpy, is_mapped=True)
            array, reservation = _within(pool, n_bytes, read)
            held = Held(as_value(array, kind), array, reservation)
            with self._lock:
                self._held[key] = held
            return held

    def _session(self, key: bytes, graph: OpenedGraph, address: str, pool: PagePool) -> Session:
        with self._lock:
            known = self._sessions.get(key)
            if known is not None:
                self._sessions.move_to_end(key)
                return known
        # What is inside of the model, the session has in memory.
        try:
            runtime, reservation = _within(
                pool, len(graph.model), lambda: new_session(graph.model, {})
            )
        except PydedupError:
            raise
        except Exception as exc:
            raise UnsupportedFormatError(f"ONNX Runtime cannot load {address}: {exc}") from exc
        session = Session(runtime, *inputs_and_outputs(runtime), reservation)
        with self._lock:
            self._sessions[key] = session
            _shorten(self._sessions)
        _give_back_after(reservation.nbytes)
        return session

    def give_up(self) -> bool:
        """Forget the session of a model, a tensor, or a large session, not used for longest.

        Calls under way keep theirs.
        """
        own: Own[Held] | None = None
        session: Session | None = None
        with self._lock:
            if self._own:
                _, own = self._own.popitem(last=False)
                # Others need the room: it is not to go back and forth.
                self._most_own, self._calm = (self._most_own or 0) // 2, 0
            elif self._held:
                self._held.popitem(last=False)
                return True
            else:
                # A list: a generator would keep the session that it stopped at.
                sessions = self._sessions.items()
                large = [key for key, s in sessions if s.reservation.nbytes >= _LARGE_BYTES]
                session = self._sessions.pop(large[0]) if large else None
        forgotten = own or session
        if forgotten is None:
            return False
        nbytes = forgotten.reservation.nbytes
        own = session = forgotten = None
        _give_back_after(nbytes)
        return True

    def alone(self) -> AbstractContextManager[object]:
        """Wait for all other calls, and keep those that come waiting."""
        return self.calls.hold(self.calls.limit)


def opened_graph(model: StoredModel, payload: Callable[[], bytes], tensor: Tensors) -> OpenedGraph:
    """Return the graph of a model whose weights are inputs, given what is stored of it."""
    infos = {info.name: info for info in model.tensors}
    return open_graph(payload(), infos, lambda name: tensor(name).numpy())


def _give_back_after(nbytes: int) -> None:
    """Give free memory back after a session was made, or given up, that has so much inside.

    The C library keeps what lies between other things, which is a part of each session: several of
    them would take that much beyond the budget.
    """
    if nbytes >= _LARGE_BYTES:
        give_back_freed()


def _within(pool: PagePool, n_bytes: int, make: Callable[[], _T]) -> tuple[_T, Reservation]:
    """Make something of so many bytes within the budget."""
    reservation = pool.reserve(n_bytes)
    try:
        return make(), reservation
    except BaseException:
        reservation.release()
        raise


def content_key(block_map: BlockMap, shape: tuple[int, ...]) -> bytes:
    """Return a key that two tensors share when they are the same blocks."""
    page_ids = block_map.page_ids
    number = id(page_ids)
    known = _contents.get(number)
    if known is not None and known[0]() is page_ids and known[1] == shape:
        return known[2]
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((shape, block_map.dtype.label, block_map.grid)).encode())
    for column in (page_ids, block_map.slots):  # which say what the bases are
        digest.update(column.tobytes())
    key = digest.digest()
    contents = _contents  # of a module, names are None once the interpreter has ended it
    gone = weakref.ref(page_ids, lambda _: contents.pop(number, None))
    contents[number] = gone, shape, key
    return key


#: Keys of the arrays of block maps by their identity, as long as these live.
_contents: dict[int, tuple[weakref.ref[NDArray[np.int64]], tuple[int, ...], bytes]] = {}


def _shorten(kept: OrderedDict[Any, Any]) -> None:
    while len(kept) > _KEPT:
        kept.popitem(last=False)


_runners: weakref.WeakKeyDictionary[PagePool, Runner] = weakref.WeakKeyDictionary()


def runner_of(pool: PagePool) -> Runner:
    """Return that of a store, by its pool."""
    runner = _runners.get(pool)
    if runner is None:
        runner = _runners[pool] = Runner()
        pool.keeps(runner)
    return runner


def _restart_runners() -> None:
    """In a forked child: take the weights over, and leave the sessions alone."""
    for pool, before in list(_runners.items()):
        runner = _runners[pool] = before.heir()
        pool.keeps(runner)


os.register_at_fork(after_in_child=_restart_runners)  # after the pools, which forget their keepers
