# SPDX-License-Identifier: Apache-2.0
"""Batches too large for the memory budget, cut where it is certain that their rows are apart.

That is so of ``nn.Sequential`` over layers that :mod:`pydedup.formats.infer_torch` knows. Of other
modules nobody knows it, and they are given their batch whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.modules.module import _has_any_global_hook

from pydedup.errors import NotFoundError
from pydedup.formats.infer_torch import infer_from_torch
from pydedup.graph import Graph
from pydedup.serving.plan import Plan, plan_run
from pydedup.types import TensorInfo

__all__ = ["Pieces", "in_pieces"]

#: Returns a tensor of the model by its name in the module.
TensorOf: TypeAlias = Callable[[str], TensorInfo]

#: Shapes of inputs whose plan is remembered.
_PLANS: Final = 64


class Pieces:
    """How a module's batches are cut."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._known: dict[tuple[torch.dtype, torch.Size], Plan | None] = {}
        self._graph = infer_from_torch(module)

    def rows(
        self, module: torch.nn.Module, args: tuple[Any, ...], tensor: TensorOf, nbytes: int
    ) -> int | None:
        """Return how many rows of a batch may take so many bytes; None to give it whole."""
        if self._graph is None or len(args) != 1 or type(args[0]) is not torch.Tensor:
            return None
        x = args[0]
        if x.is_nested or x.layout is not torch.strided or x.is_meta:
            return None
        key = x.dtype, x.shape
        known = self._known  # another thread may begin anew
        if key not in known:
            if len(known) >= _PLANS:
                known = self._known = {}
            known[key] = _plan(self._graph, tensor, x)
        plan = known[key]
        if plan is None or plan.rows is None or plan.fits_in(nbytes):
            return None
        hooked = _has_any_global_hook()  # type: ignore[no-untyped-call]
        if hooked or infer_from_torch(module) != self._graph:  # it was changed, or has hooks by now
            return None
        return max(plan.rows * nbytes // plan.nbytes, 1)


def _plan(graph: Graph, tensor: TensorOf, x: torch.Tensor) -> Plan | None:
    if x.is_floating_point():
        dtype: type = np.float64 if x.dtype is torch.float64 else np.float32
    else:
        dtype = np.int64
    shape_alone: NDArray[Any] = np.broadcast_to(np.zeros((), dtype), tuple(x.shape))
    try:
        return plan_run(graph, tensor, {graph.inputs[0]: shape_alone})
    except NotFoundError:  # tied, and stored by another name
        return None


def in_pieces(
    call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, n_rows: int
) -> torch.Tensor:
    """Return what a call gives for a batch, by calls for so many rows of it each."""
    out: torch.Tensor | None = None
    for at in range(0, len(x), n_rows):
        part = call(x[at : at + n_rows])
        if out is None:
            out = part.new_empty((len(x), *part.shape[1:]))
        out[at : at + n_rows] = part
    assert out is not None
    return out
