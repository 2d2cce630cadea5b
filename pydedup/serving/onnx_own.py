# SPDX-License-Identifier: Apache-2.0
"""Sessions of ONNX Runtime that have the weights of one model inside.

Weights that are inputs are shared between models, but the runtime cannot prepare them: where it
has them as constants, it lays them out for its kernels and merges operations, and small batches
take half of the time. That takes as much memory once more, so it is done for models that are asked
again, where the budget has room that nobody needs. Tables of which rows are looked up stay inputs:
there is nothing to prepare. Deliberately not here: when such sessions are given up
(:mod:`pydedup.serving.onnx_kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from pydedup.formats.onnx_inputs import OpenedGraph, with_constants
from pydedup.pool import PagePool, Reservation
from pydedup.serving.onnx_values import inputs_and_outputs

__all__ = ["Own", "make_own"]

_Weight = TypeVar("_Weight")


@dataclass(frozen=True, slots=True)
class Own(Generic[_Weight]):
    """A session with the weights of one model.

    Attributes
    ----------
    graph
        What it takes and gives.
    runtime, kinds, outputs
        The session, its inputs by name, and the types of its outputs.
    weights
        All weights, by name. Those that are inputs still are used where they are; the others are
        kept since no release of the runtime promises that it copies them.
    reservation
        Of what it has inside.
    """

    graph: OpenedGraph
    runtime: Any
    kinds: Mapping[str, Any]
    outputs: Mapping[str, str]
    weights: Mapping[str, _Weight]
    reservation: Reservation


def make_own(
    graph: OpenedGraph,
    weights: Mapping[str, _Weight],
    values: Mapping[str, Any],
    nbytes: int,
    new_session: Callable[[bytes, Mapping[str, Any]], Any],
    pool: PagePool,
) -> Own[_Weight] | None:
    """Return a session of a model, ``None`` where there is no room for it.

    Parameters
    ----------
    graph
        Whose weights are inputs.
    weights
        All of them.
    values, nbytes
        Those that it is to have inside, as the runtime takes them, and the bytes that it then has.
    new_session
        Makes one of a model and its constants. What it raises where the runtime does not take them
        is raised.
    pool
        Whose budget counts.
    """
    reservation = pool.reserve_free(nbytes)
    # The runtime has what it was given until all is laid out.
    meanwhile = pool.reserve_free(nbytes)
    if reservation is None or meanwhile is None:
        return None  # what one of them got is given back as it goes
    try:
        runtime = new_session(with_constants(graph.model, values), values)
    except BaseException:
        reservation.release()
        raise
    finally:
        meanwhile.release()
    graph = replace(graph, model=b"")
    return Own(graph, runtime, *inputs_and_outputs(runtime), weights, reservation)
