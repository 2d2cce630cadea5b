# SPDX-License-Identifier: Apache-2.0
"""A stored ONNX graph for a runtime, with the large weights as inputs instead of inside.

So that the runtime uses weights where they lie in memory, and one session serves all models of the
same layers. Deliberately not here: running it (:mod:`pydedup.serving.onnx_session`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydedup.errors import FormatError
from pydedup.formats._onnx_guards import guard
from pydedup.formats._onnx_tensors import (
    DTYPES,
    all_nodes,
    graphs_in,
    has_values,
    nested_tensors,
    parse,
    refuse_external,
)
from pydedup.formats.base import Array
from pydedup.types import TensorInfo

__all__ = ["OpenedGraph", "TextStep", "open_graph", "text_step", "with_constants"]

#: As in TensorProto; the version of ONNX's format since which initialisers may be no inputs.
_EXTERNAL, _WITH_CONSTANTS = 1, 4
#: Smaller tensors stay inside: shapes, axes and scales, which runtimes want to know beforehand.
_LEAST_BYTES = 1024


@dataclass(frozen=True, slots=True)
class TextStep:
    """What a graph does with inputs that are texts, as far as that is known.

    ``operators`` take texts; ``values`` are what they give that is none, and all else is made of.
    """

    operators: tuple[str, ...] = ()
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenedGraph:
    """A model for a runtime.

    Attributes
    ----------
    model
        The serialised ModelProto.
    inputs, outputs
        What the model takes and gives, weights left out.
    weights
        Inputs that are tensors of the model: name to the number of the ONNX element type.
    tables
        Those of the weights of which rows are looked up, and nothing else.
    is_recurrent
        Whether it has an LSTM or GRU, in a function of its own, too.
    has_loops
        Whether it has a Loop, which may never end; there, too.
    """

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, int]
    tables: frozenset[str]
    is_recurrent: bool
    has_loops: bool


def open_graph(
    payload: bytes, tensors: Mapping[str, TensorInfo], read: Callable[[str], Array]
) -> OpenedGraph:
    """Put the weights back into the graph that a store keeps of an ONNX model.

    Parameters
    ----------
    payload
        The artifact `pydedup.formats.onnx.GRAPH`.
    tensors
        The model's tensors by name.
    read
        Returns the elements of one.

    Raises
    ------
    FormatError
        When the graph does not parse, or wants a tensor that the model does not have, or one in
        another file.
    """
    import onnx

    model = parse(onnx.ModelProto, payload, "the stored ONNX graph")
    refuse_external(model, "the stored ONNX graph")
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    inputs = tuple(value.name for value in graph.input if value.name not in initializers)
    outputs = tuple(value.name for value in graph.output)
    given = {
        name: tensor
        for name, tensor in _top_level(graph, initializers).items()
        if name in tensors
        and tensors[name].nbytes >= _LEAST_BYTES
        and name not in outputs
        # A runtime takes packed values (of 4 bits) only as part of the model.
        and tensor.data_type in DTYPES
    }
    inside = {**dict(nested_tensors(graph)), **initializers}
    for name, tensor in inside.items():
        if name in given or has_values(tensor) or tensor.data_type == onnx.TensorProto.STRING:
            continue
        if name in tensors:
            tensor.raw_data = read(name).tobytes()
        elif 0 not in tensor.dims:
            raise FormatError(f"the stored ONNX graph wants the tensor {name!r}, which is missing")
    weights = {name: int(tensor.data_type) for name, tensor in given.items()}
    declared = {value.name for value in graph.input}
    for name, tensor in given.items():
        if name not in declared:
            kind = onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
            graph.input.append(kind)
    _keep(graph.initializer, lambda tensor: tensor.name not in given)
    _keep(graph.node, lambda node: not (node.op_type == "Constant" and node.output[0] in given))
    kinds = {node.op_type for each in (graph, *model.functions) for node in all_nodes(each)}
    tables = frozenset(given) - set(_used_otherwise(graph))
    guard(model)
    serialised = model.SerializeToString(deterministic=True)
    is_recurrent = not kinds.isdisjoint({"DynamicQuantizeLSTM", "GRU", "LSTM"})
    return OpenedGraph(
        serialised, inputs, outputs, weights, tables, is_recurrent, has_loops="Loop" in kinds
    )


def with_constants(opened: bytes, names: Collection[str]) -> bytes:
    """Return the model of an `OpenedGraph` in which these inputs are constants.

    Their values are as if they were in another file: whoever makes a session gives them.
    """
    import onnx

    model = parse(onnx.ModelProto, opened, "the stored ONNX graph")
    for value in model.graph.input:
        if value.name not in names:
            continue
        kind = value.type.tensor_type
        dims = [dim.dim_value for dim in kind.shape.dim]
        tensor = model.graph.initializer.add(
            name=value.name, data_type=kind.elem_type, dims=dims, data_location=_EXTERNAL
        )
        tensor.external_data.add(key="location", value="weights")
    _keep(model.graph.input, lambda value: value.name not in names)
    # Before, all initialisers were inputs as well.
    model.ir_version = max(model.ir_version, _WITH_CONSTANTS)
    serialised: bytes = model.SerializeToString(deterministic=True)
    return serialised


def text_step(payload: bytes, names: Collection[str]) -> TextStep:
    """Return what becomes of these inputs, which are texts; payload as for `open_graph`."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(parse(onnx.ModelProto, payload, "it")).graph
    except Exception:  # of several classes; whoever asks goes without
        return TextStep()
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    texts = set(names)
    operators, values = dict[str, None](), dict[str, None]()  # sets that keep their order
    for node in graph.node:
        if texts.isdisjoint(node.input):
            continue
        operators[node.op_type] = None
        for name in node.output:
            kind = kinds.get(name, 0)
            if not kind:  # of an operator that onnx does not know, or a sequence
                return TextStep()
            if kind == onnx.TensorProto.STRING:
                texts.add(name)
            else:
                values[name] = None
    return TextStep(tuple(operators), tuple(values))


def _used_otherwise(graph: Any) -> Iterator[str]:
    """Yield the names of all values but those that are only looked up in."""
    yield from (value.name for value in graph.output)
    for node in graph.node:
        is_look_up = node.op_type == "Gather" and not node.domain
        yield from node.input[1:] if is_look_up else node.input
        for inner in graphs_in(node):
            yield from _used_otherwise(inner)


def _top_level(graph: Any, initializers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of the main graph: initialisers, and values of constants."""
    found = dict(initializers)
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            for attribute in node.attribute:
                if attribute.name == "value":
                    found.setdefault(node.output[0], attribute.t)
    return found


def _keep(repeated: Any, wanted: Callable[[Any], bool]) -> None:
    """Remove the unwanted entries of a repeated field."""
    kept = [entry for entry in repeated if wanted(entry)]
    del repeated[:]
    repeated.extend(kept)
