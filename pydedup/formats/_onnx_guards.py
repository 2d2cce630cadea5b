# SPDX-License-Identifier: Apache-2.0
"""Changes of an ONNX graph without which some inputs end the process that runs it.

ONNX Runtime does not check everything before it computes: dividing the least of the integers by -1,
and a transform of frames of length 0, are traps of the processor, which no exception tells of. A
graph gets nodes that compute the first and refuse the second. Deliberately not here: values that
make an operation fail, or take long.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pydedup.errors import FormatError
from pydedup.formats._onnx_tensors import all_nodes, graphs_in

__all__ = ["guard"]

#: Numbers of element types in ONNX.
_INT32, _INT64, _DOUBLE = 6, 7, 11
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
#: And since which a value can be given the type of another one.
_WITH_CAST_LIKE = 15
#: How deep functions may call others, and how many nodes a graph may then have.
_DEEPEST, _MOST_NODES = 100, 1_000_000


def guard(model: Any) -> None:
    """Put guards into a model. Raises FormatError for what no graph may have."""
    kinds = {node.op_type for each in (model.graph, *model.functions) for node in all_nodes(each)}
    if kinds.isdisjoint({"Div", "STFT", "TfIdfVectorizer"}):
        return
    if any(_divides(function) for function in model.functions):
        _inline(model)
    names = _Names(model)
    for graph, versions in (
        (model.graph, model.opset_import),
        *((function, function.opset_import) for function in model.functions),
    ):
        version = _version(versions)
        if version >= _WITH_BROADCASTING:
            inferred = _Inferred(model if graph is model.graph else None, version)
            _guard(graph, _Scope(graph, inferred), names)


def _divides(function: Any) -> bool:
    """Whether a function has a division that may be of integers: it has no types of its own."""
    scope = _Scope(function, _Inferred(None, 0))
    return any(
        node.op_type == "Div"
        and len(node.input) > 1
        and _may_be_minus_one(scope.constant(node.input[1]))
        for node in all_nodes(function)
    )


def _inline(model: Any) -> None:
    """Put functions in the place of their calls, as the runtime does, where they have types."""
    import onnx.inliner

    _check_size(model)
    try:
        inlined = onnx.inliner.inline_local_functions(model)
    except Exception as exc:  # of several classes
        raise FormatError(
            f"a function of the stored ONNX graph cannot be put in the place of its calls: {exc}"
        ) from exc
    # Those of another version of the operations stay, unless that is too old for guards.
    if any(_version(one.opset_import) < _WITH_CAST_LIKE for one in inlined.functions):
        with contextlib.suppress(Exception):  # of several classes: what it cannot convert
            inlined = onnx.inliner.inline_local_functions(model, convert_version=True)
    model.CopyFrom(inlined)


def _check_size(model: Any) -> None:
    """Raise FormatError where functions call themselves, or each two others, and so on."""
    functions = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size_of(graph: Any, around: tuple[tuple[str, str], ...]) -> int:
        size = 0
        for node in all_nodes(graph):
            key = node.domain, node.op_type
            if key in functions and key not in sizes:
                if key in around or len(around) == _DEEPEST:
                    raise FormatError(
                        f"the functions of the stored ONNX graph call each other without an end, "
                        f"or {_DEEPEST} deep: {key[1]!r}"
                    )
                sizes[key] = size_of(functions[key], (*around, key))
            size += sizes.get(key, 1)
        return size

    size = size_of(model.graph, ())
    if size > _MOST_NODES:
        raise FormatError(
            f"the stored ONNX graph has {size:,} nodes with those of its functions, of which at "
            f"most {_MOST_NODES:,} are run"
        )


def _version(versions: Any) -> int:
    return max((int(one.version) for one in versions if one.domain in _OWN), default=0)


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


class _Inferred:
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
        """Whether what an operation of ONNX's own makes may be integers of 32 or 64 bits."""
        import onnx

        try:
            output = onnx.defs.get_schema(node.op_type, self.version, "").outputs[0]
        except Exception:  # it has none in this version: the runtime says so
            return True
        return not output.types.isdisjoint({"tensor(int32)", "tensor(int64)"})


class _Scope:
    """What the names in a graph mean, and in those around it."""

    def __init__(self, graph: Any, inferred: _Inferred, outer: _Scope | None = None) -> None:
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
        return maker.domain not in _OWN or self.inferred.is_whole(maker)


def _guard(graph: Any, scope: _Scope, names: _Names) -> None:
    changed: list[Any] = []
    for node in graph.node:
        for inner in graphs_in(node):
            _guard(inner, _Scope(inner, scope.inferred, scope), names)
        if node.domain in _OWN:
            if node.op_type == "Div" and len(node.input) == 2:  # else the runtime refuses it
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
    a, b = node.input
    if not _may_be_minus_one(scope.constant(b)):
        yield node
        return
    inferred = scope.inferred
    kind = scope.type_of(b) or scope.type_of(a) or inferred.type_of(b) or inferred.type_of(a)
    if kind in (_INT32, _INT64):
        yield from _division_of_whole(node, kind, names)
    elif not kind and scope.may_be_whole(a) and scope.may_be_whole(b):
        if inferred.version >= _WITH_CAST_LIKE:
            yield from _division_of_any(node, names)
        elif inferred.is_of_model:  # a very old one, and floats as a rule
            yield node
        else:
            raise FormatError(
                f"the division {node.name or node.output[0]!r} in a function of the stored ONNX "
                "graph may be one of integers, which nothing tells, and dividing the least of them "
                f"by -1 would end the process; the function is of version {inferred.version} of "
                f"ONNX's operations: export it with opset {_WITH_CAST_LIKE} or later"
            )
    else:
        yield node


def _division_of_whole(node: Any, kind: int, names: _Names) -> Iterator[Any]:
    import onnx

    make = onnx.helper.make_node
    a, b = node.input
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


def _division_of_any(node: Any, names: _Names) -> Iterator[Any]:
    """Yield the same for numbers of any type, which are floats as a rule and take longer by it."""
    import onnx

    make = onnx.helper.make_node
    a, b = node.input
    double, is_it, mask, twice, sign, divisor, quotient = (names.new() for _ in range(7))
    numbers = {number: names.new() for number in (-1.0, 1.0)}
    for number, name in numbers.items():
        value = onnx.helper.make_tensor(name, _DOUBLE, (), [number])
        yield make("Constant", [], [name], value=value)
    one = names.new()
    yield make("Cast", [b], [double], to=_DOUBLE)
    yield make("Equal", [double, numbers[-1.0]], [is_it])
    yield make("CastLike", [is_it, b], [mask])
    yield make("CastLike", [numbers[1.0], b], [one])
    yield make("Add", [mask, mask], [twice])
    yield make("Sub", [one, twice], [sign])
    yield make("Mul", [b, sign], [divisor])
    yield make("Div", [a, divisor], [quotient], name=node.name)
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
