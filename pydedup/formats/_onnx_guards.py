# SPDX-License-Identifier: Apache-2.0
"""Changes of an ONNX graph without which some inputs end the process that runs it.

ONNX Runtime does not check everything before it computes: dividing integers by 0 (before 1.25), the
least of them by -1, and a transform of frames of length 0 are traps of the processor, which no
exception tells of. A graph gets nodes that compute the second and refuse the others. Deliberately
not here: values that make an operation fail, or take long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pydedup.errors import FormatError
from pydedup.formats._onnx_scopes import OWN, Inferred, Scope
from pydedup.formats._onnx_tensors import all_nodes, graphs_in

__all__ = ["guard"]

#: Numbers of element types in ONNX.
_INT32, _INT64, _BOOL, _DOUBLE = 6, 7, 9, 11
#: Of integers of any size, with a sign and without.
_WHOLE = frozenset({2, 3, 4, 5, _INT32, _INT64, 12, 13})
#: Since which version of ONNX's operations shapes of two inputs are made one.
_WITH_BROADCASTING = 7
#: And since which a value can be given the type of another one.
_WITH_CAST_LIKE = 15
#: How deep functions may call others, and how many nodes a graph may then have.
_DEEPEST, _MOST_NODES = 100, 1_000_000


def guard(model: Any) -> None:
    """Put guards into a model. Raises FormatError for what no graph may have."""
    kinds = {node.op_type for each in (model.graph, *model.functions) for node in all_nodes(each)}
    if kinds.isdisjoint({"Div", "Mod", "STFT", "TfIdfVectorizer"}):
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
            inferred = Inferred(model if graph is model.graph else None, version)
            _guard(graph, Scope(graph, inferred), names)


def _divides(function: Any) -> bool:
    """Whether a function has a division that may be of integers: it has no types of its own."""
    scope = Scope(function, Inferred(None, 0))
    return any(
        _is_division(node) and _may_trap(scope.constant(node.input[1]))
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
    return max((int(one.version) for one in versions if one.domain in OWN), default=0)


class _Names:
    """Names that nothing in the model has."""

    def __init__(self, model: Any) -> None:
        self._taken = {
            name
            for each in (model.graph, *model.functions)
            for node in all_nodes(each)
            for name in (node.name, *node.input, *node.output)
        }
        self._count = 0

    def new(self, says: str = "guard") -> str:
        """Return one that begins so; of a node too, whose name the runtime tells of an error."""
        while True:
            self._count += 1
            name = f"{says}_{self._count}"
            if name not in self._taken:
                return name


def _guard(graph: Any, scope: Scope, names: _Names) -> None:
    changed: list[Any] = []
    for node in graph.node:
        for inner in graphs_in(node):
            _guard(inner, Scope(inner, scope.inferred, scope), names)
        if node.domain in OWN:
            if _is_division(node):
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


def _division(node: Any, scope: Scope, names: _Names) -> Iterator[Any]:
    """Yield what divides integers, fails where one is divided by 0, and has -a in place of a / -1.

    A node of that name says so: the runtime does it itself from 1.25 on.
    """
    a, b = node.input
    if not _may_trap(scope.constant(b)):
        yield node
        return
    inferred = scope.inferred
    kind = scope.type_of(b) or scope.type_of(a) or inferred.type_of(b) or inferred.type_of(a)
    if kind in _WHOLE:
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
    b = node.input[1]
    wide, is_zero, divisor = (names.new() for _ in range(3))
    numbers = {number: names.new() for number in (0, -1)}
    for number, name in numbers.items():
        value = onnx.helper.make_tensor(name, _INT64, (), [number])
        yield make("Constant", [], [name], value=value)
    yield make("Cast", [b], [wide], to=_INT64)
    yield make("Equal", [wide, numbers[0]], [is_zero])
    gate, nodes = _gate(is_zero, names)
    yield from nodes
    if kind not in (_INT32, _INT64):  # for which little else is there, and which -1 does no harm
        shape, same = names.new(), names.new()
        yield make("Shape", [b], [shape])
        yield make("Mul", [shape, gate], [same])
        yield make("Reshape", [b, same], [divisor])
        node.input[1] = divisor
        yield node
        return
    is_it, one, mask = (names.new() for _ in range(3))
    yield make("Equal", [wide, numbers[-1]], [is_it])
    yield make("Cast", [is_it], [mask], to=kind)
    yield make("Cast", [gate], [one], to=kind)
    yield from _divided(node, one, mask, divisor, names)


def _division_of_any(node: Any, names: _Names) -> Iterator[Any]:
    """Yield the same for numbers of any type, which are floats as a rule and take longer by it."""
    import onnx

    make = onnx.helper.make_node
    b = node.input[1]
    double, is_it, is_zero, half, whole, of_whole, wrong = (names.new() for _ in range(7))
    one, mask, divisor = (names.new() for _ in range(3))
    numbers = {number: names.new() for number in (-1.0, 0.0, 0.5)}
    for number, name in numbers.items():
        value = onnx.helper.make_tensor(name, _DOUBLE, (), [number])
        yield make("Constant", [], [name], value=value)
    yield make("Cast", [b], [double], to=_DOUBLE)
    yield make("Equal", [double, numbers[-1.0]], [is_it])
    yield make("Equal", [double, numbers[0.0]], [is_zero])
    yield make("CastLike", [numbers[0.5], b], [half])  # 0 among integers
    yield make("Cast", [half], [whole], to=_DOUBLE)
    yield make("Equal", [whole, numbers[0.0]], [of_whole])
    yield make("And", [is_zero, of_whole], [wrong])
    gate, nodes = _gate(wrong, names)
    yield from nodes
    yield make("CastLike", [is_it, b], [mask])
    yield make("CastLike", [gate, b], [one])
    yield from _divided(node, one, mask, divisor, names)


def _gate(wrong: str, names: _Names) -> tuple[str, list[Any]]:
    """Return what is 1, and the nodes that make it, of which one fails if any of these is true."""
    import onnx

    make = onnx.helper.make_node
    counted, count, some, at, ones, gate = (names.new() for _ in range(6))
    value = onnx.helper.make_tensor(ones, _INT64, (1,), [1])
    return gate, [
        make("Cast", [wrong], [counted], to=_INT64),
        make("ReduceSum", [counted], [count], keepdims=0),  # of nothing 0
        make("Cast", [count], [some], to=_BOOL),
        make("Cast", [some], [at], to=_INT64),
        make("Constant", [], [ones], value=value),
        # There is an entry 0, and none with the number 1.
        make("Gather", [ones, at], [gate], name=names.new("division by zero")),
    ]


def _divided(node: Any, one: str, mask: str, divisor: str, names: _Names) -> Iterator[Any]:
    """Yield a division by 1 in the place of -1, which ``mask`` says, and its other sign."""
    import onnx

    make = onnx.helper.make_node
    a, b = node.input
    twice, sign, quotient = (names.new() for _ in range(3))
    yield make("Add", [mask, mask], [twice])
    yield make("Sub", [one, twice], [sign])
    yield make("Mul", [b, sign], [divisor])
    if node.op_type == "Mod":  # by -1 it is 0, as by 1
        yield make("Mod", [a, divisor], list(node.output), name=node.name)
        return
    yield make("Div", [a, divisor], [quotient], name=node.name)
    yield make("Mul", [quotient, sign], list(node.output))


def _is_division(node: Any) -> bool:
    """Whether it is one that may be of integers; with other inputs, the runtime refuses it."""
    if node.op_type not in ("Div", "Mod") or len(node.input) != 2:
        return False
    # As C's fmod, of floats.
    return not any(one.name == "fmod" and one.i for one in node.attribute)


def _may_trap(tensor: Any) -> bool:
    """Whether a divisor, if it is known, may be 0 or -1."""
    if tensor is None:
        return True
    import onnx

    try:
        values = onnx.numpy_helper.to_array(tensor)
        return bool(((values == -1) | (values == 0)).any())
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
    says = names.new("the frames of STFT must not be empty")
    yield make("Gather", [ones, at], [gate], name=says)
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
