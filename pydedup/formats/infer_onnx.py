# SPDX-License-Identifier: Apache-2.0
"""The layers of an ONNX model, when every one of its operations has an exact counterpart.

Anything else (an unknown operation, a control flow, a semantic that differs, such as a Gemm with
alpha) gives no graph rather than an approximate one. Of initialisers only shapes are needed,
except for small constants (shapes, axes) that must have their data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pydedup.errors import ArgumentError
from pydedup.formats._onnx_attributes import Attributes, UnknownError
from pydedup.formats._onnx_tensors import DTYPES, is_constant_weight
from pydedup.graph import AttrValue, Graph, Node
from pydedup.types import DType

__all__ = ["infer_from_onnx"]

#: Operations that map one to one, without attributes.
_PLAIN = {
    "Relu": "relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Softplus": "softplus",
    "Identity": "identity",
    "Add": "add",
    "Mul": "mul",
    "Sub": "sub",
}
#: Operations of the graph whose result is a batch of images, or has the rank of their inputs.
_IMAGES = {"conv2d", "max_pool2d", "avg_pool2d"}
_SAME_RANK = {
    *("relu", "sigmoid", "tanh", "softplus", "identity", "gelu", "leaky_relu", "elu"),
    *("batch_norm", "layer_norm", "softmax", "log_softmax", "add", "sub", "mul"),
}
_FLOATS = {kind for kind, dtype in DTYPES.items() if dtype.is_float}
#: Operations that keep integers as they are; all others compute, and with floats alone.
_MOVES = {"identity", "concat", "flatten", "reshape", "transpose"}


def infer_from_onnx(model: Any) -> Graph | None:
    """Return the graph of an ``onnx.ModelProto``, or ``None`` when it cannot be exact."""
    try:
        return _Translation(model).graph()
    except (UnknownError, ArgumentError, IndexError, ValueError):
        # Nobody has checked the model: nodes may lack inputs, and attributes be of any length.
        return None


class _Translation:
    """One pass over the nodes of a model."""

    def __init__(self, model: Any) -> None:
        graph = model.graph
        self._proto = graph
        self._opset = max((o.version for o in model.opset_import if not o.domain), default=0)
        self._shapes = {t.name: tuple(t.dims) for t in graph.initializer}
        self._tensors = {t.name: t for t in graph.initializer}
        self._inputs = tuple(i.name for i in graph.input if i.name not in self._tensors)
        self._ranks = {
            v.name: len(v.type.tensor_type.shape.dim)
            for v in (*graph.input, *graph.value_info, *graph.output)
            if v.type.tensor_type.HasField("shape")
        }
        #: Element types of values and weights, by which computing with integers shows.
        self._types: dict[str, int | None] = {
            i.name: i.type.tensor_type.elem_type for i in graph.input
        }
        self._types.update((t.name, t.data_type) for t in graph.initializer)
        self._constants: dict[str, Any] = {}
        self._uses = Counter(name for node in graph.node for name in node.input)
        self._uses.update(value.name for value in graph.output)
        #: Values that are another value under a new name (dropout does nothing here).
        self._alias: dict[str, str] = {}
        #: Outputs of a MatMul by a weight, to which a following Add may bring a bias.
        self._open_linear: dict[str, int] = {}
        self._nodes: list[Node] = []

    def graph(self) -> Graph:
        for node in self._proto.node:
            if node.domain not in ("", "ai.onnx") or len(node.output) < 1:
                raise UnknownError
            if any(name for name in node.output[1:]) and node.op_type != "Dropout":
                raise UnknownError
            translate = _TRANSLATE.get(node.op_type)
            if node.op_type in _PLAIN:
                self._plain(node)
            elif translate is None:
                raise UnknownError
            else:
                translate(self, node, Attributes({a.name: a for a in node.attribute}))
        outputs = tuple(self._value(v.name) for v in self._proto.output)
        kinds = (DTYPES.get(v.type.tensor_type.elem_type) for v in self._proto.output)
        halves = tuple(name for name, kind in zip(outputs, kinds, strict=True) if kind is DType.F16)
        graph = Graph(self._inputs, outputs, tuple(self._nodes), halves)
        return replace(graph, shapes=self._declared(counted=graph.counts_axes()))

    def _declared(self, *, counted: bool) -> dict[str, tuple[int, ...]]:
        """Return the shapes of inputs where sizes that are fixed may be part of what is computed.

        Exporters that were told of one batch write its size into a Reshape, too. So may be how many
        axes there are, where nodes count them from the front.
        """
        shapes = {
            value.name: tuple(
                dim.dim_value if dim.dim_value > 0 else -1
                for dim in value.type.tensor_type.shape.dim
            )
            for value in self._proto.input
            if value.name in self._inputs and value.type.tensor_type.HasField("shape")
        }
        is_reshaped = any(node.op == "reshape" for node in self._nodes)
        fixed = [any(size != -1 for size in (s if is_reshaped else s[:1])) for s in shapes.values()]
        return shapes if any(fixed) or counted else {}

    # ---- helpers ------------------------------------------------------------------------------

    def _value(self, name: str) -> str:
        """Return the activation with that name; an initialiser is none."""
        if name in self._tensors or name in self._constants or not name:
            raise UnknownError
        return self._alias.get(name, name)

    def _weight(self, name: str, rank: int | None = None) -> str:
        shape = self._shapes.get(name)
        if shape is None or (rank is not None and len(shape) != rank):
            raise UnknownError
        if self._types.get(name) not in DTYPES:
            raise UnknownError  # packed values, which a store has as other ones
        return name

    def _constant(self, name: str) -> list[int]:
        """Return the integers of a small constant."""
        tensor = self._constants.get(name, self._tensors.get(name))
        if tensor is None:
            raise UnknownError
        import onnx.numpy_helper

        try:
            values = np.asarray(onnx.numpy_helper.to_array(tensor))
        except (ValueError, TypeError) as exc:
            raise UnknownError from exc
        if values.dtype.kind not in "iu" or values.ndim > 1:
            raise UnknownError
        return [int(value) for value in values.reshape(-1)]

    def _add(
        self,
        op: str,
        node: Any,
        weights: Mapping[str, str] | None = None,
        attrs: Mapping[str, AttrValue] | None = None,
        *,
        inputs: tuple[str, ...] = (),
    ) -> None:
        """Append a node; ``inputs`` are by default the first of the ONNX node alone."""
        inputs = inputs or (node.input[0],)
        values = tuple(self._value(name) for name in inputs)
        # Of an embedding, ids are no part of what is computed.
        terms = (*(() if op == "embedding" else values), *(weights or {}).values())
        types = [self._types.get(name) for name in terms]
        if op not in _MOVES and not _FLOATS.issuperset(types):
            raise UnknownError
        if not set(types) <= {None, *DTYPES}:
            raise UnknownError  # texts, sequences
        self._types[node.output[0]] = types[0]
        self._nodes.append(Node(op, values, node.output[0], weights or {}, attrs or {}))
        # What exporters leave out of value_info, pools of whole images have to know.
        ranks = [self._ranks.get(name) for name in inputs]
        if op in _IMAGES:
            self._ranks.setdefault(node.output[0], 4)
        elif op in _SAME_RANK and None not in ranks:
            self._ranks.setdefault(node.output[0], max(rank for rank in ranks if rank is not None))

    # ---- operations ---------------------------------------------------------------------------

    def _plain(self, node: Any) -> None:
        if any(one.name == "axis" for one in node.attribute):
            raise UnknownError  # before opset 7: where the second one's axes lie in the first
        if node.op_type == "Add" and self._add_bias(node):
            return
        self._add(_PLAIN[node.op_type], node, inputs=tuple(node.input))

    def _add_bias(self, node: Any) -> bool:
        """Fold the Add of a 1-D initialiser into the MatMul before it."""
        for value, bias in (tuple(node.input), tuple(node.input)[::-1]):
            at = self._open_linear.get(value)
            if at is None or bias not in self._shapes or self._uses[value] != 1:
                continue
            linear = self._nodes[at]
            out = self._shapes[linear.weights["weight"]][1]
            if self._shapes[bias] != (out,):
                raise UnknownError
            weights = {**linear.weights, "bias": bias}
            self._nodes[at] = Node("linear", linear.inputs, node.output[0], weights, linear.attrs)
            self._types[node.output[0]] = self._types[value]
            return True
        return False

    def _gemm(self, node: Any, attrs: Attributes) -> None:
        if attrs.number("alpha", 1.0) != 1.0 or attrs.integer("transA", 0):
            raise UnknownError
        weights = {"weight": self._weight(node.input[1], 2)}
        transposed = bool(attrs.integer("transB", 0))
        if bias := _input(node, 2):
            out = self._shapes[node.input[1]][0 if transposed else 1]
            if attrs.number("beta", 1.0) != 1.0 or self._shapes.get(bias) != (out,):
                raise UnknownError
            weights["bias"] = bias
        self._add("linear", node, weights, _transpose(not transposed))

    def _matmul(self, node: Any, attrs: Attributes) -> None:
        weights = {"weight": self._weight(node.input[1], 2)}
        self._add("linear", node, weights, _transpose(True))
        self._open_linear[node.output[0]] = len(self._nodes) - 1

    def _conv(self, node: Any, attrs: Attributes) -> None:
        weight = self._weight(node.input[1], 4)  # images; sequences and volumes have other ranks
        shape = self._shapes[weight]
        kernel = attrs.integers("kernel_shape", list(shape[2:]))
        if kernel != list(shape[2:]):
            raise UnknownError
        weights = {"weight": weight}
        if bias := _input(node, 2):
            if self._shapes.get(bias) != (shape[0],):
                raise UnknownError
            weights["bias"] = bias
        stride, dilation = attrs.integers("strides", [1, 1]), attrs.integers("dilations", [1, 1])
        found: dict[str, AttrValue] = {
            "stride": stride,
            "padding": attrs.pads(kernel, stride, dilation),
            "dilation": dilation,
            "groups": attrs.integer("group", 1),
        }
        self._add("conv2d", node, weights, found)

    def _pool(self, node: Any, attrs: Attributes) -> None:
        kernel = attrs.integers("kernel_shape", [])
        if len(kernel) != 2:
            raise UnknownError
        stride, dilation = attrs.integers("strides", [1, 1]), attrs.integers("dilations", [1, 1])
        if dilation != [1, 1] and attrs.text("auto_pad", "").startswith("SAME"):
            raise UnknownError  # the runtime pads as if there were none
        found: dict[str, AttrValue] = {
            "kernel": kernel,
            "stride": stride,
            "padding": attrs.pads(kernel, stride, dilation),
        }
        ceil_mode = bool(attrs.integer("ceil_mode", 0))
        if node.op_type == "MaxPool":
            found.update(dilation=dilation, ceil_mode=ceil_mode)
            self._add("max_pool2d", node, attrs=found)
            return
        # What counts in a mean behind the padding was defined late, and runtimes differ.
        if ceil_mode or dilation != [1, 1]:
            raise UnknownError
        found["count_include_pad"] = bool(attrs.integer("count_include_pad", 0))
        self._add("avg_pool2d", node, attrs=found)

    def _global_pool(self, node: Any, attrs: Attributes) -> None:
        rank = self._ranks.get(node.input[0], self._ranks.get(node.output[0]))
        if rank is None or rank < 3:
            raise UnknownError
        op = "mean" if node.op_type == "GlobalAveragePool" else "max"
        found: dict[str, AttrValue] = {"axis": list(range(2, rank)), "keepdims": True}
        self._add(op, node, attrs=found)

    def _gather(self, node: Any, attrs: Attributes) -> None:
        if attrs.integer("axis", 0) != 0:
            raise UnknownError
        weights = {"weight": self._weight(node.input[0], 2)}
        self._add("embedding", node, weights, {"from_end": True}, inputs=(node.input[1],))

    def _gelu(self, node: Any, attrs: Attributes) -> None:
        mode = attrs.text("approximate", "none")
        self._add("gelu", node, attrs={"approximate": mode})

    def _softmax(self, node: Any, attrs: Attributes) -> None:
        op = "softmax" if node.op_type == "Softmax" else "log_softmax"
        axis = attrs.integer("axis", -1 if self._opset >= 13 else 1)
        if self._opset < 13:
            # Before opset 13 it flattens all axes from `axis` on: the same only for the last.
            rank = self._ranks.get(node.input[0], self._ranks.get(node.output[0]))
            if axis != -1 and (rank is None or axis != rank - 1):
                raise UnknownError
        self._add(op, node, attrs={"axis": axis})

    def _leaky_relu(self, node: Any, attrs: Attributes) -> None:
        alpha = attrs.number("alpha", 0.01)
        self._add("leaky_relu", node, attrs={"alpha": alpha})

    def _elu(self, node: Any, attrs: Attributes) -> None:
        self._add("elu", node, attrs={"alpha": attrs.number("alpha", 1.0)})

    def _flatten(self, node: Any, attrs: Attributes) -> None:
        if attrs.integer("axis", 1) != 1:  # any other axis flattens what lies before it, too
            raise UnknownError
        self._add("flatten", node, attrs={"start_axis": 1})

    def _reshape(self, node: Any, attrs: Attributes) -> None:
        shape = self._constant(node.input[1])
        if 0 in shape:
            # It keeps a size: in front that of the rows, where it is one of a graph, too.
            if attrs.integer("allowzero", 0) or shape[0] != 0 or 0 in shape[1:]:
                raise UnknownError
            if shape == [0, -1]:
                self._add("flatten", node, attrs={"start_axis": 1})
                return
            if -1 in shape:
                raise UnknownError  # which cannot be told of an empty batch
        self._add("reshape", node, attrs={"shape": shape})

    def _layer_norm(self, node: Any, attrs: Attributes) -> None:
        if len(node.input) < 3 or attrs.integer("stash_type", 1) != 1:
            raise UnknownError
        scale, bias = self._weight(node.input[1]), self._weight(node.input[2])
        if 1 in self._shapes[scale] or self._shapes[bias] != self._shapes[scale]:
            raise UnknownError  # may be stretched to the axes that are normalised
        axes = len(self._shapes[scale])
        axis = attrs.integer("axis", -1)
        rank = self._ranks.get(node.input[0])
        if axis != -axes and (rank is None or axis != rank - axes):
            raise UnknownError
        eps = attrs.number("epsilon", 1e-5)
        weights = {"weight": scale, "bias": bias}
        self._add("layer_norm", node, weights, {"axes": axes, "eps": eps})

    def _batch_norm(self, node: Any, attrs: Attributes) -> None:
        if attrs.integer("training_mode", 0) or attrs.integer("spatial", 1) != 1:
            raise UnknownError
        roles = ("weight", "bias", "mean", "var")
        weights = {
            role: self._weight(name, 1) for role, name in zip(roles, node.input[1:], strict=True)
        }
        eps = attrs.number("epsilon", 1e-5)
        self._add("batch_norm", node, weights, {"eps": eps, "axis": 1})

    def _concat(self, node: Any, attrs: Attributes) -> None:
        axis = attrs.integer("axis", 1)
        self._add("concat", node, attrs={"axis": axis}, inputs=tuple(node.input))

    def _reduce(self, node: Any, attrs: Attributes) -> None:
        if named := _input(node, 1):
            axes = self._constant(named)
        elif "axes" in attrs:
            axes = attrs.integers("axes", [])
        else:
            raise UnknownError
        if not axes:  # all axes or none, by a further attribute
            raise UnknownError
        if len({axis < 0 for axis in axes}) > 1:
            raise UnknownError  # 1 and -1 may be the same, which the runtime reduces once
        keep = bool(attrs.integer("keepdims", 1))
        axis: AttrValue = axes[0] if len(axes) == 1 else axes
        op = "mean" if node.op_type == "ReduceMean" else "max"
        self._add(op, node, attrs={"axis": axis, "keepdims": keep})

    def _transpose_axes(self, node: Any, attrs: Attributes) -> None:
        if "perm" in attrs:
            perm = attrs.integers("perm", [])
        elif node.input[0] in self._ranks:
            perm = list(range(self._ranks[node.input[0]]))[::-1]
        else:
            raise UnknownError
        self._add("transpose", node, attrs={"perm": perm})

    def _dropout(self, node: Any, attrs: Attributes) -> None:
        if any(name and self._uses.get(name) for name in node.output[1:]):
            raise UnknownError  # somebody wants the mask
        if _input(node, 2):
            raise UnknownError  # may drop while predicting
        if any(value.name == node.output[0] for value in self._proto.output):
            self._add("identity", node)  # has the name that users ask for
        else:
            self._alias[node.output[0]] = self._value(node.input[0])

    def _constant_node(self, node: Any, attrs: Attributes) -> None:
        import onnx

        if "value" in attrs and is_constant_weight(attrs["value"].t):
            self._tensors[node.output[0]] = attrs["value"].t
            self._shapes[node.output[0]] = tuple(attrs["value"].t.dims)
            self._types[node.output[0]] = attrs["value"].t.data_type
        elif "value" in attrs:
            self._constants[node.output[0]] = attrs["value"].t
        elif "value_ints" in attrs:
            values = np.array(list(attrs["value_ints"].ints), np.int64)
            self._constants[node.output[0]] = onnx.numpy_helper.from_array(values)
        elif "value_int" in attrs:
            value = np.array(attrs["value_int"].i, np.int64)
            self._constants[node.output[0]] = onnx.numpy_helper.from_array(value)
        else:
            raise UnknownError


def _input(node: Any, number: int) -> str:
    """Return the name of an optional input, empty where it is left out."""
    return str(node.input[number]) if len(node.input) > number else ""


def _transpose(needed: bool) -> Mapping[str, AttrValue]:
    return {"transpose": True} if needed else {}


_TRANSLATE: Mapping[str, Callable[[_Translation, Any, Attributes], None]] = {
    "Gemm": _Translation._gemm,
    "MatMul": _Translation._matmul,
    "Conv": _Translation._conv,
    "MaxPool": _Translation._pool,
    "AveragePool": _Translation._pool,
    "GlobalAveragePool": _Translation._global_pool,
    "GlobalMaxPool": _Translation._global_pool,
    "Gather": _Translation._gather,
    "Gelu": _Translation._gelu,
    "Softmax": _Translation._softmax,
    "LogSoftmax": _Translation._softmax,
    "LeakyRelu": _Translation._leaky_relu,
    "Elu": _Translation._elu,
    "Flatten": _Translation._flatten,
    "Reshape": _Translation._reshape,
    "LayerNormalization": _Translation._layer_norm,
    "BatchNormalization": _Translation._batch_norm,
    "Concat": _Translation._concat,
    "ReduceMean": _Translation._reduce,
    "ReduceMax": _Translation._reduce,
    "Transpose": _Translation._transpose_axes,
    "Dropout": _Translation._dropout,
    "Constant": _Translation._constant_node,
}
