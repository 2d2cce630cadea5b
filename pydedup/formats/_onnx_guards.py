# SPDX-License-Identifier: Apache-2.0
"""Changes of an ONNX graph without which some inputs end the process that runs it.

ONNX Runtime does not check everything before it computes: dividing the least of the integers by -1,
and a transform of frames of length 0, are traps of the processor, which no exception tells of. A
graph gets nodes that compute the first and refuse the second. Deliberately not here: values that
make an operation fail, or take long.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pydedup.errors import FormatError
from pydedup.formats._onnx_tensors import all_nodes, graphs_in

__all__ = ["guard"]

#: Numbers of element types in ONNX.
_INT32, _INT64 = 6, 7
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
_OWN = ("", "ai.onnx")
#: So many operations back from a division its type is looked for.
_STEPS = 64
#: Since which version of ONNX's operations shapes of two inputs are made one.
_WITH_BROADCASTING = 7


def guard(model: Any) -> None:
    """Put guards into a model. Raises FormatError for what no graph may have."""
    kinds = {node.op_type for each in (model.graph, *model.functions) for node in all_nodes(each)}
    if kinds.isdisjoint({"Div", "STFT", "TfIdfVectorizer"}):
        return
    names = _Names(model)
    for graph, versions in (
        (model.graph, model.opset_import),
        *((function, function.opset_import) for function in model.functions),
    ):
        version = max((one.version for one in versions if one.domain in _OWN), default=0)
        if version >= _WITH_BROADCASTING:
            _guard(graph, _Scope(graph, None), names)


class _Names:
    """Names that nothing in the model has."""

    def __init__(self, model: Any) -> None:
        self._taken = {
            name
            for each in (model.graph, *model.functions)
            for node in all_nodes(each)
            for name in (*node.input, *node.output)
        }
        self._count = 0

    def new(self) -> str:
        while True:
            self._count += 1
            name = f"guard_{self._count}"
            if name not in self._taken:
                return name


class _Scope:
    """What the names in a graph mean, and in those around it."""

    def __init__(self, graph: Any, outer: _Scope | None) -> None:
        self._outer = outer
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


def _guard(graph: Any, scope: _Scope, names: _Names) -> None:
    changed: list[Any] = []
    for node in graph.node:
        for inner in graphs_in(node):
            _guard(inner, _Scope(inner, scope), names)
        if node.domain in _OWN:
            if node.op_type == "Div":
                changed += _division(node, scope, names)
                continue
            if node.op_type == "STFT":
                changed += _frames(node, names)
            elif node.op_type == "TfIdfVectorizer":
                _check_grams(node)
        changed.append(node)
    if len(changed) > len(graph.node):
        del graph.node[:]
        graph.node.extend(changed)


def _division(node: Any, scope: _Scope, names: _Names) -> Iterator[Any]:
    """Yield what computes a quotient of integers, and -a in the place of a / -1."""
    a, b = node.input[:2]
    kind = scope.type_of(b) or scope.type_of(a)
    if kind not in (_INT32, _INT64) or not _may_be_minus_one(scope.constant(b)):
        yield node
        return
    import onnx

    make = onnx.helper.make_node
    is_it, mask, twice, divisor, quotient, sign = (names.new() for _ in range(6))
    numbers = {number: names.new() for number in (-1, 1, 2)}
    for number, name in numbers.items():
        value = onnx.helper.make_tensor(name, kind, (), [number])
        yield make("Constant", [], [name], value=value)
    yield make("Equal", [b, numbers[-1]], [is_it])
    yield make("Cast", [is_it], [mask], to=kind)
    yield make("Mul", [mask, numbers[2]], [twice])
    yield make("Add", [b, twice], [divisor])  # 1 in the place of -1
    yield make("Div", [a, divisor], [quotient], name=node.name)
    yield make("Sub", [numbers[1], twice], [sign])
    yield make("Mul", [quotient, sign], list(node.output))


def _may_be_minus_one(tensor: Any) -> bool:
    if tensor is None:
        return True
    import onnx

    try:
        return bool((onnx.numpy_helper.to_array(tensor) == -1).any())
    except Exception:  # its values are elsewhere, or do not fit: the runtime says so
        return True


def _frames(node: Any, names: _Names) -> Iterator[Any]:
    """Yield what fails where frames have no elements, and let the node wait for that."""
    import onnx

    make = onnx.helper.make_node
    inputs = [*node.input, "", "", "", ""]
    window, length = inputs[2:4]
    if not (window or length) or not inputs[1]:
        return  # the runtime refuses it
    whole, least, one, ones, is_less, at, gate, factor, step = (names.new() for _ in range(9))
    if length:
        yield make("Cast", [length], [whole], to=_INT64)
    else:
        yield make("Size", [window], [whole])
    yield make("ReduceMin", [whole], [least], keepdims=0)
    for name, shape in ((one, ()), (ones, (1,))):
        value = onnx.helper.make_tensor(name, _INT64, shape, [1])
        yield make("Constant", [], [name], value=value)
    yield make("Less", [least, one], [is_less])
    yield make("Cast", [is_less], [at], to=_INT64)
    # There is an entry 0, and none with the number 1.
    yield make("Gather", [ones, at], [gate], name="the frames of STFT must not be empty")
    yield make("CastLike", [gate, node.input[1]], [factor])
    yield make("Mul", [node.input[1], factor], [step])
    node.input[1] = step


def _check_grams(node: Any) -> None:
    """Raise FormatError where the runtime would read behind the numbers of the columns."""
    lists = {one.name: list(one.ints or one.strings) for one in node.attribute}
    counts = lists.get("ngram_counts", [])
    pool = lists.get("pool_int64s") or lists.get("pool_strings", [])
    bounds = [*counts, len(pool)]
    grams = sum(
        max(end - begin, 0) // length for length, (begin, end) in enumerate(pairwise(bounds), 1)
    )
    if grams > len(lists.get("ngram_indexes", [])):
        raise FormatError(
            f"the TfIdfVectorizer {node.name!r} of the stored ONNX graph has {grams} n-grams, and "
            f"columns for {len(lists.get('ngram_indexes', []))}"
        )
