# SPDX-License-Identifier: Apache-2.0
"""ONNX models with operations that our own engine does not know, run by ONNX Runtime.

The runtime is given the weights as inputs, where they lie in memory, so that nothing is copied and
sessions are shared: one serves all models that have the same layers, and a tensor that several
models have is in memory once. Tensors are loaded whole, counted against the memory budget of the
store, and make room for others (onnx_kept.py). A model that is asked again gets a session of its
own where there is room (onnx_own.py). Deliberately not here: graphs that we run ourselves
(:mod:`pydedup.serving.engine`), which stream.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup.catalog import StoredModel
from pydedup.errors import ArgumentError, BudgetError
from pydedup.formats.onnx_inputs import OpenedGraph, text_step
from pydedup.pool import PagePool
from pydedup.serving.engine import Tensors, check_inputs
from pydedup.serving.onnx_kept import Held, Runner, Session, content_key, opened_graph, runner_of
from pydedup.serving.onnx_loops import run_with_loops
from pydedup.serving.onnx_own import Own
from pydedup.serving.onnx_values import (
    as_output,
    as_runtime_input,
    check_kinds,
    check_outputs,
)
from pydedup.serving.predict import by_name
from pydedup.text import largest

__all__ = ["prepare_onnx", "run_onnx"]

#: What the runtime says where there is no memory for what it computes, and what we make of it.
_NO_MEMORY, _TOLD_AS = "std::bad_alloc", "there is no memory for what it computes"

_T = TypeVar("_T")


def run_onnx(
    model: StoredModel,
    payload: Callable[[], bytes],
    tensor: Tensors,
    pool: PagePool,
    x: ArrayLike | Mapping[str, ArrayLike],
    seconds: float | None = None,
) -> dict[str, NDArray[Any]]:
    """Compute all outputs of a model.

    Parameters
    ----------
    model
        Where its tensors are.
    payload
        Returns the artifact that the reader of ONNX leaves: the graph without its weights. What
        it raises where there is none is raised before anything else.
    tensor
        Returns a tensor of the model by name.
    pool
        Whose budget counts.
    x
        The inputs by name, or the only one. Numbers are converted to the type of the input, but
        not to integers.
    seconds
        How long a graph with loops may take.

    Raises
    ------
    ArgumentError
        When inputs are missing, unknown, or do not fit, or loops do not end in time.
    BudgetError
        When the weights do not fit the budget, or there is no memory for what is computed.
    UnsupportedFormatError
        When onnx or onnxruntime is not installed, or does not know the graph's operations, or an
        input or output is no array, or of a type that numpy lacks, or an input is text.
    """
    return _with_room(
        model,
        payload,
        pool,
        lambda runner: _run(runner, model, payload, tensor, pool, x, seconds),
    )


def prepare_onnx(
    model: StoredModel, payload: Callable[[], bytes], tensor: Tensors, pool: PagePool
) -> None:
    """Make ready what predicting needs beside the weights, as far as it is not.

    Raises what `run_onnx` does of the model, whatever its inputs are.
    """
    _with_room(model, payload, pool, lambda runner: _opened(runner, model, payload, tensor, pool))


def check_that_it_may_fit(model: StoredModel, pool: PagePool) -> None:
    """Raise BudgetError where the weights, equal ones once, are more than the whole budget."""
    if model.row.logical_bytes <= pool.memory_bytes:
        return
    tensors = zip(model.block_maps(), model.tensors, strict=False)
    needed = sum({content_key(at, info.shape): info.nbytes for at, info in tensors}.values())
    if needed > pool.memory_bytes:
        error = _too_large(
            model,
            f"the budget has {pool.memory_bytes:,} bytes for pages and weights, and equal tensors "
            f"counted once, they are {needed:,}; open the store with more memory",
        )
        error.never = True
        raise error


# ---- inside -------------------------------------------------------------------------------------


def _with_room(
    model: StoredModel, payload: Callable[[], bytes], pool: PagePool, call: Callable[[Runner], _T]
) -> _T:
    """Return what a call does that others may leave no room for."""
    runner = runner_of(pool)
    if not runner.knows(model.row.id):
        with contextlib.suppress(BudgetError):  # there is room for its pages when others are done
            payload()
    if model.row.logical_bytes <= pool.memory_bytes:
        with runner.calls.hold(1), contextlib.suppress(BudgetError):
            return call(runner)
    else:  # others need neither wait nor make room for what is in vain
        check_that_it_may_fit(model, pool)
    # What others keep as long as they run may have left no room: once more, with nobody beside.
    with runner.alone():
        return call(runner)


def _opened(
    runner: Runner,
    model: StoredModel,
    payload: Callable[[], bytes],
    tensor: Tensors,
    pool: PagePool,
) -> tuple[OpenedGraph, Session | Own[Held]]:
    """Return the graph of a model and what runs it, if that is possible."""
    session: Session | Own[Held] | None = runner.own(model.row.id)
    if isinstance(session, Own):
        graph = session.graph
    else:
        graph, session = runner.graph(model, payload, tensor, pool)
    kinds = {name: session.kinds[name].type for name in graph.inputs}
    check_kinds(kinds, model.address, lambda texts: text_step(payload(), texts))
    check_outputs(session.outputs, model.address)
    return graph, session


def _too_large(model: StoredModel, why: object) -> BudgetError:
    return BudgetError(
        f"{model.address} is run by ONNX Runtime, which needs all of its "
        f"{model.row.logical_bytes:,} bytes of weights at once, "
        f"{largest({info.name: info.nbytes for info in model.tensors})}: {why}"
    )


def _run(
    runner: Runner,
    model: StoredModel,
    payload: Callable[[], bytes],
    tensor: Tensors,
    pool: PagePool,
    x: ArrayLike | Mapping[str, ArrayLike],
    seconds: float | None,
) -> dict[str, NDArray[Any]]:
    """Do what `run_onnx` promises, as far as other calls leave room for the weights."""
    graph, session = _opened(runner, model, payload, tensor, pool)
    inputs = by_name(x, graph.inputs, model.address)
    check_inputs(inputs, graph.inputs)
    given = {name: as_runtime_input(value, session.kinds[name]) for name, value in inputs.items()}
    if graph.is_recurrent:  # the runtime ends the process where a batch or sequence is empty
        for name, value in given.items():
            shape = tuple(value.shape if isinstance(value, np.ndarray) else value.shape())
            if 0 in shape:
                raise ArgumentError(
                    f"input {name!r} has shape {shape}; the LSTM or GRU of {model.address} "
                    "cannot be run on nothing"
                )
    outputs = session.outputs
    # Kept until the end: the runtime reads the arrays where they are.
    held: dict[str, Held] = {}
    if isinstance(session, Session):
        try:
            for name, kind in graph.weights.items():
                held[name] = runner.tensor(model.block_map(name), tensor(name), kind, pool)
        except BudgetError as exc:
            raise _too_large(model, exc) from exc
        opened = functools.partial(opened_graph, model, payload, tensor)
        own = runner.make_own(model, session, opened, held, graph.tables, pool)
        session = own or session
    if isinstance(session, Own):
        held = {name: session.weights[name] for name in graph.tables}
    given.update((name, weight.value) for name, weight in held.items())
    try:
        if graph.has_loops:
            found = run_with_loops(session.runtime, list(outputs), given, seconds)
        else:
            found = session.runtime.run(list(outputs), given)
    except TimeoutError as exc:
        raise ArgumentError(
            f"{model.address} did not end within {seconds:g} seconds: for these inputs a loop of "
            "its graph takes longer, or never ends"
        ) from exc
    except Exception as exc:  # of many classes, by the runtime's own numbering
        said = str(exc).replace(_NO_MEMORY, _TOLD_AS)
        told = f"ONNX Runtime cannot run {model.address}: {said}"
        is_full = isinstance(exc, MemoryError) or _NO_MEMORY in str(exc)
        raise (BudgetError(told) if is_full else ArgumentError(told)) from exc
    finally:  # who waits for this call wants the room
        given.clear()
        held.clear()
    return {
        name: as_output(value, name, kind, model.address)
        for value, (name, kind) in zip(found, outputs.items(), strict=True)
    }
