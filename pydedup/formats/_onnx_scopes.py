# SPDX-License-Identifier: Apache-2.0
"""What the names in an ONNX graph mean: constants, and types of elements, as far as they are known.

Deliberately not here: what follows from that for a runtime (``_onnx_guards.py``).
"""

from __future__ import annotations

import functools
from typing import Any

from pydedup.formats._onnx_tensors import all_nodes, graphs_in

__all__ = ["OWN", "Inferred", "Scope"]

#: The number of the element type in ONNX.
_INT64 = 7
#: Operations whose results are int64; those that leave the type as it is.
_INDICES = frozenset({"ArgMax", "ArgMin", "NonZero", "Shape", "Size"})
_KEEPING = frozenset(
    {
        *("Abs", "Add", "Clip", "Compress", "Concat", "CumSum", "Div", "Expand", "Flatten"),
        *("Gather", "GatherElements", "GatherND", "Identity", "Max", "Min", "Mod", "Mul", "Neg"),
        *("Pad", "Pow", "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape"),
        *("ScatterElements", "ScatterND", "Sign", "Slice", "Squeeze", "Sub", "Sum", "Tile"),
        *("Transpose", "Trilu", "Unsqueeze"),
    }
)
#: Domains of ONNX's own operations.
OWN = ("", "ai.onnx")
#: So many operations back from a division its type is looked for.
_STEPS = 64


class Inferred:
    """Types that onnx infers of a model, when they are asked for; of functions it tells none."""

    def __init__(self, model: Any, version: int) -> None:
        self._model, self.version = model, version
        self.is_of_model = model is not None

    def type_of(self, name: str) -> int:
        """Return the element type of a value, 0 where it is not known."""
        return self._types.get(name, 0)

    @functools.cached_property
    def _types(self) -> dict[str, int]:
        if self._model is None:
            return {}
        import onnx

        try:
            graph = onnx.shape_inference.infer_shapes(self._model).graph
        except Exception:  # of several classes: what is wrong with the model, the runtime says
            return {}
        types: dict[str, int] = {}
        within = [graph, *(inner for node in all_nodes(graph) for inner in graphs_in(node))]
        for value in (value for each in within for value in each.value_info):
            kind = value.type.tensor_type.elem_type
            if types.setdefault(value.name, kind) != kind:  # of two graphs beside each other
                types[value.name] = 0
        return types

    def is_whole(self, node: Any) -> bool:
        """Whether what an operation of ONNX's own makes may be integers."""
        import onnx

        try:
            output = onnx.defs.get_schema(node.op_type, self.version, "").outputs[0]
        except Exception:  # it has none in this version: the runtime says so
            return True
        return any("int" in kind for kind in output.types)


class Scope:
    """What the names in a graph mean, and in those around it."""

    def __init__(self, graph: Any, inferred: Inferred, outer: Scope | None = None) -> None:
        self._outer = outer
        self.inferred = inferred
        self._types = {
            value.name: value.type.tensor_type.elem_type
            for part in ("input", "value_info")
            for value in getattr(graph, part, ())
            if hasattr(value, "name")  # inputs of functions are names alone
        }
        self._constants = {tensor.name: tensor for tensor in getattr(graph, "initializer", ())}
        self._makers = {name: node for node in graph.node for name in node.output}

    def constant(self, name: str) -> Any:
        """Return the tensor that a name stands for, ``None`` if it is computed or given."""
        found = self._constants.get(name)
        maker = self._makers.get(name)
        if found is None and maker is not None and maker.op_type == "Constant":
            found = next((one.t for one in maker.attribute if one.name == "value"), None)
        if found is None and maker is None and name not in self._types and self._outer is not None:
            return self._outer.constant(name)
        return found

    def type_of(self, name: str, steps: int = _STEPS) -> int:
        """Return the element type of a value, 0 where it is not known."""
        found = self.constant(name)
        if found is not None:
            return int(found.data_type)
        if self._types.get(name):
            return int(self._types[name])
        maker = self._makers.get(name)
        if maker is None:
            return self._outer.type_of(name, steps) if self._outer is not None else 0
        if maker.op_type in _INDICES:
            return _INT64
        if maker.op_type == "Cast":
            return next((int(one.i) for one in maker.attribute if one.name == "to"), 0)
        at = 0 if maker.op_type in _KEEPING else 1 if maker.op_type in ("Where", "CastLike") else -1
        if at < 0 or at >= len(maker.input) or not steps:
            return 0
        return self.type_of(maker.input[at], steps - 1)

    def may_be_whole(self, name: str) -> bool:
        """Whether a value of unknown type may be integers, going by what makes it."""
        maker = self._makers.get(name)
        if maker is None:
            return self._outer is None or self._outer.may_be_whole(name)
        return maker.domain not in OWN or self.inferred.is_whole(maker)
