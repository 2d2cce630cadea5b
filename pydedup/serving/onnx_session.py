# SPDX-License-Identifier: Apache-2.0
"""ONNX models with operations that our own engine does not know, run by ONNX Runtime.

The runtime is given the weights as inputs, where they lie in memory, so that nothing is copied and
sessions are shared: one serves all models that have the same layers, and a tensor that several
models have is in memory once. Tensors are loaded whole, counted against the memory budget of the
store, and the ones that were not used for longest make room for others, and for pages; so do then
sessions with much inside of their models, where weights of 4 bits are. Deliberately not here:
graphs that we run ourselves (:mod:`pydedup.serving.engine`), which stream.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
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
from numpy.typing import ArrayLike, NDArray

from pydedup import config
from pydedup.arguments import as_dtype
from pydedup.blocks import BlockMap
from pydedup.catalog import StoredModel
from pydedup.errors import ArgumentError, BudgetError, UnsupportedFormatError, not_installed
from pydedup.formats.onnx_inputs import OpenedGraph, open_graph
from pydedup.pool import PagePool, Reservation
from pydedup.pool.admission import Gate
from pydedup.serving.engine import Tensors, check_inputs
from pydedup.serving.predict import as_input, by_name
from pydedup.serving.tensor import StoredTensor
from pydedup.types import DType

__all__ = ["import_onnxruntime", "is_installed", "run_onnx"]

#: Graphs that are kept ready, and sessions; the weights are not in them.
_KEPT = 64
#: Sessions make room for others when they take this; smaller ones are no help to speak of.
_LARGE_BYTES = 1 << 20
#: Calls that may be under way at once: more than there are threads.
_CALLS = 1 << 20
#: ONNX's number of the only type of inputs that numpy lacks.
_BF16 = 16
#: Types of ONNX as sessions name them -> ours.
_TYPES = {
    "tensor(float)": DType.F32,
    "tensor(double)": DType.F64,
    "tensor(float16)": DType.F16,
    "tensor(bfloat16)": DType.BF16,
    "tensor(bool)": DType.BOOL,
    **{
        f"tensor({sign}int{bits})": DType.of_label(f"{sign}int{bits}")
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


def run_onnx(
    model: StoredModel,
    payload: bytes,
    tensor: Tensors,
    pool: PagePool,
    x: ArrayLike | Mapping[str, ArrayLike],
) -> dict[str, NDArray[Any]]:
    """Compute all outputs of a model.

    Parameters
    ----------
    model
        Where its tensors are.
    payload
        The artifact that the reader of ONNX leaves: the graph without its weights.
    tensor
        Returns a tensor of the model by name.
    pool
        Whose budget counts.
    x
        The inputs by name, or the only one. Numbers are converted to the type of the input, but
        not to integers.

    Raises
    ------
    ArgumentError
        When inputs are missing, unknown, or do not fit.
    BudgetError
        When the weights do not fit the budget.
    UnsupportedFormatError
        When onnx or onnxruntime is not installed, or does not know the graph's operations, or an
        output is no array, or of a type that numpy lacks.
    """
    runner = _runner_of(pool)
    if model.row.logical_bytes <= pool.memory_bytes:
        with runner.calls.hold(1), contextlib.suppress(BudgetError):
            return _run(runner, model, payload, tensor, pool, x)
    else:  # others need neither wait nor make room for what is in vain
        check_that_it_may_fit(model, pool)
    # What others keep as long as they run may have left no room: once more, with nobody beside.
    with runner.alone():
        return _run(runner, model, payload, tensor, pool, x)


def is_installed() -> bool:
    """Return whether the packages are there that run such models; loads none of them."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def import_onnxruntime() -> Any:
    """Return ONNX Runtime. Raises UnsupportedFormatError where it or onnx cannot be imported."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as exc:
        raise UnsupportedFormatError(not_installed("this ONNX model", exc, "onnx")) from exc
    return onnxruntime


def check_that_it_may_fit(model: StoredModel, pool: PagePool) -> None:
    """Raise BudgetError where the weights, equal ones once, are more than the whole budget."""
    if model.row.logical_bytes <= pool.memory_bytes:
        return
    tensors = zip(model.block_maps(), model.tensors, strict=True)
    needed = sum({_content(at, info.shape): info.nbytes for at, info in tensors}.values())
    if needed > pool.memory_bytes:
        error = _too_large(
            model,
            f"the budget has {pool.memory_bytes:,} bytes for pages and weights, and equal tensors "
            f"counted once, they are {needed:,}; open the store with more memory",
        )
        error.never = True
        raise error


# ---- inside -------------------------------------------------------------------------------------


def _too_large(model: StoredModel, why: object) -> BudgetError:
    return BudgetError(
        f"{model.address} is run by ONNX Runtime, which needs all of its "
        f"{model.row.logical_bytes:,} bytes of weights at once: {why}"
    )


def _run(
    runner: _Runner,
    model: StoredModel,
    payload: bytes,
    tensor: Tensors,
    pool: PagePool,
    x: ArrayLike | Mapping[str, ArrayLike],
) -> dict[str, NDArray[Any]]:
    """Do what `run_onnx` promises, as far as other calls leave room for the weights."""
    graph, session = runner.graph(model, payload, tensor, pool)
    inputs = by_name(x, graph.inputs, model.address)
    check_inputs(inputs, graph.inputs)
    kinds = {value.name: value for value in session.runtime.get_inputs()}
    given = {name: _as_input(value, kinds[name]) for name, value in inputs.items()}
    if graph.is_recurrent:  # the runtime ends the process where a batch or sequence is empty
        for name, value in given.items():
            if 0 in value.shape():
                raise ArgumentError(
                    f"input {name!r} has shape {tuple(value.shape())}; the LSTM or GRU of "
                    f"{model.address} cannot be run on nothing"
                )
    # Kept until the end: the runtime reads the arrays where they are.
    try:
        held = {
            name: runner.tensor(model.block_map(name), tensor(name), kind, pool)
            for name, kind in graph.weights.items()
        }
    except BudgetError as exc:
        raise _too_large(model, exc) from exc
    given.update((name, weight.value) for name, weight in held.items())
    try:
        found = session.runtime.run_with_ort_values(list(graph.outputs), given)
    except Exception as exc:  # of many classes, by the runtime's own numbering
        raise ArgumentError(f"ONNX Runtime cannot run {model.address}: {exc}") from exc
    finally:  # who waits for this call wants the room
        given.clear()
        held.clear()
    outputs = zip(graph.outputs, found, strict=True)
    return {name: _as_output(value, f"{model.address} gives {name!r}") for name, value in outputs}


@dataclass(frozen=True, slots=True)
class _Held:
    """A tensor in memory, as the runtime takes it."""

    value: Any
    array: NDArray[Any]
    reservation: Reservation


@dataclass(frozen=True, slots=True)
class _Session:
    """A session of the runtime."""

    runtime: Any
    reservation: Reservation


_T = TypeVar("_T")


class _Runner:
    """The sessions and loaded tensors of one store. Safe between threads.

    It refers neither to the store nor to its pool, which it must not keep alive.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        #: Where calls are under way, each of which keeps its weights.
        self.calls = Gate(_CALLS)
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        #: By model: its graph, and which session runs it.
        self._models: OrderedDict[int, tuple[OpenedGraph, bytes]] = OrderedDict()
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()
        self._held: OrderedDict[bytes, _Held] = OrderedDict()

    def graph(
        self, model: StoredModel, payload: bytes, tensor: Tensors, pool: PagePool
    ) -> tuple[OpenedGraph, _Session]:
        number = model.row.id
        with self._lock:
            graph, key = self._models.get(number, (None, b""))
            session = self._sessions.get(key)
            if graph is not None and session is not None:
                self._models.move_to_end(number)
                self._sessions.move_to_end(key)
                return graph, session
        infos = {info.name: info for info in model.tensors}
        import_onnxruntime()
        graph = open_graph(payload, infos, lambda name: tensor(name).numpy())
        key = hashlib.blake2b(graph.model, digest_size=16).digest()
        session = self._session(key, graph, model.address, pool)
        graph = replace(graph, model=b"")
        with self._lock:
            self._models[number] = graph, key
            _shorten(self._models)
        return graph, session

    def tensor(self, block_map: BlockMap, stored: StoredTensor, kind: int, pool: PagePool) -> _Held:
        """Return a tensor in memory, loaded unless this or another model has the same one."""
        key = _content(block_map, stored.shape)
        with self._loading:  # by one thread at a time: two would need the room twice
            with self._lock:
                held = self._held.get(key)
                if held is not None:
                    self._held.move_to_end(key)
                    return held
            n_bytes = math.prod(stored.shape) * stored.dtype.itemsize
            array, reservation = _within(pool, n_bytes, stored.numpy)
            held = _Held(_as_value(array, kind), array, reservation)
            with self._lock:
                self._held[key] = held
            return held

    def _session(self, key: bytes, graph: OpenedGraph, address: str, pool: PagePool) -> _Session:
        with self._lock:
            known = self._sessions.get(key)
            if known is not None:
                self._sessions.move_to_end(key)
                return known
        # What is inside of the model, the session has in memory.
        runtime, reservation = _within(
            pool, len(graph.model), lambda: _new_session(graph.model, address)
        )
        session = _Session(runtime, reservation)
        with self._lock:
            self._sessions[key] = session
            _shorten(self._sessions)
        return session

    def give_up(self) -> bool:
        """Forget the tensor, or then the large session, that was not used for longest.

        Calls under way keep theirs.
        """
        forgotten: object = None
        with self._lock:
            if self._held:
                forgotten = self._held.popitem(last=False)
            else:
                sessions = self._sessions.items()
                large = (key for key, s in sessions if s.reservation.nbytes >= _LARGE_BYTES)
                forgotten = self._sessions.pop(next(large, b""), None)
        return forgotten is not None

    def alone(self) -> AbstractContextManager[object]:
        """Wait for all other calls, and keep those that come waiting."""
        return self.calls.hold(self.calls.limit)


def _within(pool: PagePool, n_bytes: int, make: Callable[[], _T]) -> tuple[_T, Reservation]:
    """Make something of so many bytes within the budget."""
    reservation = pool.reserve(n_bytes)
    try:
        return make(), reservation
    except BaseException:
        reservation.release()
        raise


def _new_session(model: bytes, address: str) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    if "PYDEDUP_THREADS" in os.environ:
        options.intra_op_num_threads = config.threads()
    options.log_severity_level = 4  # what goes wrong is raised, and need not be printed too
    # A spinning thread would take the core that our kernels use next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as exc:
        raise UnsupportedFormatError(f"ONNX Runtime cannot load {address}: {exc}") from exc


def _content(block_map: BlockMap, shape: tuple[int, ...]) -> bytes:
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


def _as_value(array: NDArray[Any], kind: int) -> Any:
    """Return an array as the runtime takes it; the memory stays the array's."""
    ort = import_onnxruntime()
    if array.dtype.kind in "biuf":
        return ort.OrtValue.ortvalue_from_numpy(array)
    plain = array.view(np.dtype(f"u{array.dtype.itemsize}"))  # bf16 and f8 have no numpy type
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(plain, kind)


def _as_input(x: ArrayLike, kind: Any) -> Any:
    """Return an input in the type that the model wants. Raises ArgumentError."""
    array = as_input(x, f"input {kind.name!r}")
    wanted = _TYPES.get(kind.type)
    if wanted is None:
        raise ArgumentError(f"input {kind.name!r} is a {kind.type}, which is not supported")
    both_whole = wanted.numpy.kind in "iu" and array.dtype.kind in "iu"
    if not (both_whole or wanted.is_float or wanted.numpy == array.dtype):
        raise ArgumentError(f"input {kind.name!r} must be {wanted.label}, not {array.dtype}")
    if array.dtype.kind not in "biuf":
        try:
            DType.of(array.dtype)
        except ArgumentError:
            raise ArgumentError(
                f"input {kind.name!r} must hold numbers, not {array.dtype}"
            ) from None
    if both_whole and array.size:
        limits = np.iinfo(wanted.numpy)
        for number in (int(array.min()), int(array.max())):
            if not limits.min <= number <= limits.max:
                raise ArgumentError(
                    f"input {kind.name!r} must be {wanted.label}, from {limits.min} to "
                    f"{limits.max}; it has {number}"
                )
    return _as_value(as_dtype(array, wanted.numpy), _BF16)


def _as_output(value: Any, what: str) -> NDArray[Any]:
    """Return an output as an array. Raises UnsupportedFormatError."""
    kind: str = value.data_type()
    if kind != "tensor(string)" and (kind not in _TYPES or _TYPES[kind] is DType.BF16):
        advice = "; convert its classifier with options={'zipmap': False}" if "map(" in kind else ""
        raise UnsupportedFormatError(f"{what} as {kind}, which is not supported{advice}")
    array: NDArray[Any] = value.numpy()
    return array


def _shorten(kept: OrderedDict[Any, Any]) -> None:
    while len(kept) > _KEPT:
        kept.popitem(last=False)


_runners: weakref.WeakKeyDictionary[PagePool, _Runner] = weakref.WeakKeyDictionary()
#: Those of a parent process: their threads do not exist here, and ending them would wait for ever.
_left: list[_Runner] = []


def _runner_of(pool: PagePool) -> _Runner:
    runner = _runners.get(pool)
    if runner is None or runner.process != os.getpid():
        if runner is not None:
            _left.append(runner)
        runner = _runners[pool] = _Runner()
        pool.keeps(runner)
    return runner
