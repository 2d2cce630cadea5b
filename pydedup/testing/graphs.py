# SPDX-License-Identifier: Apache-2.0
"""Graphs computed in numpy, straight from the definitions of the operations.

Slow, and independent of the engine that serves graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pydedup.graph import Graph, Node

__all__ = ["compute"]

Array = npt.NDArray[Any]
_erf = np.vectorize(math.erf)
#: Operations without weights and attributes.
_PLAIN: Mapping[str, Callable[..., Array]] = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "softplus": lambda x: np.log1p(np.exp(x)),
    "add": np.add,
    "mul": np.multiply,
    "sub": np.subtract,
}


def compute(graph: Graph, tensors: Mapping[str, Array], *inputs: Array) -> list[Array]:
    """Run a graph in numpy, one node after the other."""
    values = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        weights = {role: tensors[name].astype(np.float64) for role, name in node.weights.items()}
        values[node.output] = _compute(node, [values[name] for name in node.inputs], weights)
    return [values[name] for name in graph.outputs]


def _compute(node: Node, inputs: list[Array], w: dict[str, Array]) -> Any:
    x, attr = inputs[0], node.attr
    if node.op in _PLAIN:
        return _PLAIN[node.op](*inputs)
    match node.op:
        case "linear":
            matrix = w["weight"] if attr("transpose") else w["weight"].T
            return x @ matrix + w.get("bias", np.zeros(1))
        case "embedding":
            return w["weight"][x]
        case "embedding_bag":
            return _bag(node, inputs, w["weight"])
        case "gelu" if attr("approximate") == "none":
            return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
        case "gelu":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case "softmax" | "log_softmax":
            shifted = x - x.max(attr("axis"), keepdims=True)
            total = np.exp(shifted).sum(attr("axis"), keepdims=True)
            return np.exp(shifted) / total if node.op == "softmax" else shifted - np.log(total)
        case "leaky_relu":
            return np.where(x > 0, x, attr("alpha") * x)
        case "elu":
            return np.where(x > 0, x, attr("alpha") * np.expm1(x))
        case "flatten":
            return x.reshape(*x.shape[: attr("start_axis")], -1)
        case "reshape":
            return x.reshape([size or x.shape[i] for i, size in enumerate(attr("shape"))])
        case "layer_norm":
            axes = tuple(range(-attr("axes"), 0))
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            return (x - mean) / np.sqrt(var + attr("eps")) * w["weight"] + w["bias"]
        case "batch_norm":
            shape = [1] * x.ndim
            shape[attr("axis")] = -1
            v = {role: value.reshape(shape) for role, value in w.items()}
            return (x - v["mean"]) / np.sqrt(v["var"] + attr("eps")) * v["weight"] + v["bias"]
        case "concat":
            return np.concatenate(inputs, attr("axis"))
        case "mean":
            axis = attr("axis")
            axis = tuple(axis) if isinstance(axis, list) else axis
            return x.mean(axis, keepdims=attr("keepdims"))
        case "transpose":
            return x.transpose(attr("perm"))
    raise AssertionError(node.op)


def _bag(node: Node, inputs: list[Array], weight: Array) -> Array:
    ids = inputs[0]
    if len(inputs) == 1:
        bags = list(ids)
    else:
        ends = inputs[1][1:] if node.attr("include_last_offset") else [*inputs[1][1:], len(ids)]
        bags = [ids[a:b] for a, b in zip(inputs[1], ends, strict=False)]
    padding = node.attr("padding_idx")
    rows = []
    for bag in bags:
        kept = weight[[i for i in bag if padding is None or i != padding % len(weight)]]
        mode: str = node.attr("mode")
        empty = np.zeros(weight.shape[1])
        rows.append(getattr(kept, mode)(0) if len(kept) else empty)
    return np.array(rows)
