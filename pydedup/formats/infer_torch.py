# SPDX-License-Identifier: Apache-2.0
"""The layers of a torch module, when they are certain without running it.

Certain means: ``nn.Sequential``, nested or subclassed without a ``forward`` of its own, over
exactly the classes below, without hooks. A subclass of a layer may compute anything, so classes
are compared, never ``isinstance``; they are compared by name, so that torch need not be imported
to say no.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from pydedup.errors import ArgumentError
from pydedup.graph import AttrValue, Graph, Node

__all__ = ["infer_from_torch"]

#: Operation, the module's attribute for each role of a weight, attributes of the node.
_Layer: TypeAlias = tuple[str, dict[str, str], dict[str, AttrValue]]

_WEIGHT = {"weight": "weight"}
_WEIGHT_AND_BIAS = {"weight": "weight", "bias": "bias"}

_MODULES = "torch.nn.modules."
_SEQUENTIAL = _MODULES + "container.Sequential"
_DROPPED = {
    f"{_MODULES}dropout.{name}"
    for name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout")
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


class _UncertainError(Exception):
    """The module does something that a graph cannot say."""


def infer_from_torch(module: object) -> Graph | None:
    """Return the graph of a module, or ``None`` unless it is certain."""
    if not _is_sequential(module):
        return None
    nodes: list[Node] = []
    value = "input"
    try:
        for path, layer in _layers(module, ""):
            found = _layer(layer)
            if found is None:
                continue
            op, roles, attrs = found
            weights = {role: f"{path}.{name}" for role, name in roles.items()}
            # No path is that of a layer and goes on, too.
            output = path if path != "input" else "input.output"
            nodes.append(Node(op, (value,), output, weights, attrs))
            value = output
        return Graph(("input",), (value,), tuple(nodes)) if nodes else None
    except (_UncertainError, ArgumentError):
        return None


def _layers(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, layer) in the order of computation, a shared layer each time it is used."""
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        raise _UncertainError
    for name, child in module._modules.items():
        if _is_sequential(child):
            yield from _layers(child, f"{prefix}{name}.")
        elif any(getattr(child, hooks, None) for hooks in _HOOKS):
            raise _UncertainError
        else:
            yield f"{prefix}{name}", child


def _is_sequential(module: object) -> bool:
    for base in type(module).__mro__:
        if _name(base) == _SEQUENTIAL:
            own = type(module)
            # A subclass that computes otherwise says so in one of these, and an instance can
            # carry a forward of its own.
            same = all(
                getattr(own, name) is getattr(base, name) for name in ("forward", "__call__")
            )
            return same and "forward" not in vars(module)
    return False


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _layer(layer: Any) -> _Layer | None:
    """Return what a layer computes, ``None`` for one that does nothing when predicting."""
    kind = _name(type(layer))
    if layer is None or "forward" in vars(layer):
        raise _UncertainError
    if kind in _DROPPED:
        return None
    describe = _DESCRIBE.get(kind)
    if describe is None:
        raise _UncertainError
    return describe(layer)


def _plain(op: str) -> Callable[[Any], _Layer]:
    return lambda layer: (op, {}, {})


def _linear(layer: Any) -> _Layer:
    return "linear", _weights(layer), {}


def _weights(layer: Any) -> dict[str, str]:
    return _WEIGHT if layer.bias is None else _WEIGHT_AND_BIAS


def _embedding(layer: Any) -> _Layer:
    if layer.max_norm is not None:  # changes rows when they are looked up
        raise _UncertainError
    return "embedding", _WEIGHT, {}


def _embedding_bag(layer: Any) -> _Layer:
    if layer.max_norm is not None:
        raise _UncertainError
    attrs: dict[str, AttrValue] = {"mode": layer.mode}
    if layer.padding_idx is not None:
        attrs["padding_idx"] = int(layer.padding_idx)
    if layer.include_last_offset:
        attrs["include_last_offset"] = True
    return "embedding_bag", _WEIGHT, attrs


def _pair(value: Any) -> list[int]:
    """Return what torch takes as one number or two as two."""
    first, second = value if isinstance(value, tuple | list) else (value, value)
    return [int(first), int(second)]


def _conv2d(layer: Any) -> _Layer:
    if layer.padding_mode != "zeros":
        raise _UncertainError
    kernel, dilation = _pair(layer.kernel_size), _pair(layer.dilation)
    if layer.padding == "valid":
        padding = [0, 0, 0, 0]
    elif layer.padding == "same":  # an odd row or column goes below or to the right
        whole = [(size - 1) * apart for size, apart in zip(kernel, dilation, strict=True)]
        before = [total // 2 for total in whole]
        padding = before + [total - part for total, part in zip(whole, before, strict=True)]
    else:
        padding = _pair(layer.padding) * 2
    attrs: dict[str, AttrValue] = {
        "stride": _pair(layer.stride),
        "padding": padding,
        "dilation": dilation,
        "groups": int(layer.groups),
    }
    return "conv2d", _weights(layer), attrs


def _pool_attrs(layer: Any) -> dict[str, AttrValue]:
    return {
        "kernel": _pair(layer.kernel_size),
        "stride": _pair(layer.stride),
        "padding": _pair(layer.padding) * 2,
        "ceil_mode": bool(layer.ceil_mode),
    }


def _max_pool2d(layer: Any) -> _Layer:
    if layer.return_indices:
        raise _UncertainError
    return "max_pool2d", {}, {**_pool_attrs(layer), "dilation": _pair(layer.dilation)}


def _avg_pool2d(layer: Any) -> _Layer:
    if layer.divisor_override is not None:
        raise _UncertainError
    attrs = {**_pool_attrs(layer), "count_include_pad": bool(layer.count_include_pad)}
    return "avg_pool2d", {}, attrs


def _whole_image(op: str) -> Callable[[Any], _Layer]:
    def describe(layer: Any) -> _Layer:
        size = layer.output_size
        if size not in (1, (1, 1)) or getattr(layer, "return_indices", False):
            raise _UncertainError  # other windows depend on the size of the image
        return op, {}, {"axis": [-2, -1], "keepdims": True}

    return describe


def _flatten(layer: Any) -> _Layer:
    if layer.end_dim != -1:
        raise _UncertainError
    return "flatten", {}, {"start_axis": int(layer.start_dim)}


def _softmax(op: str) -> Callable[[Any], _Layer]:
    def describe(layer: Any) -> _Layer:
        if layer.dim is None:  # torch then guesses from the input's rank
            raise _UncertainError
        return op, {}, {"axis": int(layer.dim)}

    return describe


def _slope(op: str, alpha: float) -> _Layer:
    return op, {}, {"alpha": float(alpha)}


def _softplus(layer: Any) -> _Layer:
    # Above the threshold torch returns x itself, which at 20 is log(1 + exp(x)) in float32.
    if layer.beta != 1 or layer.threshold != 20:
        raise _UncertainError
    return "softplus", {}, {}


def _layer_norm(layer: Any) -> _Layer:
    if layer.weight is None or layer.bias is None:
        raise _UncertainError
    attrs: dict[str, AttrValue] = {"axes": len(layer.normalized_shape), "eps": float(layer.eps)}
    return "layer_norm", _WEIGHT_AND_BIAS, attrs


def _batch_norm(layer: Any) -> _Layer:
    if layer.weight is None or layer.bias is None or layer.running_mean is None:
        raise _UncertainError
    roles = {**_WEIGHT_AND_BIAS, "mean": "running_mean", "var": "running_var"}
    return "batch_norm", roles, {"eps": float(layer.eps), "axis": 1}


_DESCRIBE: Mapping[str, Callable[[Any], _Layer]] = {
    _MODULES + "linear.Linear": _linear,
    _MODULES + "linear.Identity": _plain("identity"),
    _MODULES + "sparse.Embedding": _embedding,
    _MODULES + "sparse.EmbeddingBag": _embedding_bag,
    _MODULES + "conv.Conv2d": _conv2d,
    _MODULES + "pooling.MaxPool2d": _max_pool2d,
    _MODULES + "pooling.AvgPool2d": _avg_pool2d,
    _MODULES + "pooling.AdaptiveAvgPool2d": _whole_image("mean"),
    _MODULES + "pooling.AdaptiveMaxPool2d": _whole_image("max"),
    _MODULES + "flatten.Flatten": _flatten,
    _MODULES + "activation.ReLU": _plain("relu"),
    _MODULES + "activation.Sigmoid": _plain("sigmoid"),
    _MODULES + "activation.Tanh": _plain("tanh"),
    _MODULES + "activation.SiLU": _plain("silu"),
    _MODULES + "activation.GELU": lambda layer: ("gelu", {}, {"approximate": layer.approximate}),
    _MODULES + "activation.LeakyReLU": lambda layer: _slope("leaky_relu", layer.negative_slope),
    _MODULES + "activation.ELU": lambda layer: _slope("elu", layer.alpha),
    _MODULES + "activation.Softplus": _softplus,
    _MODULES + "activation.Softmax": _softmax("softmax"),
    _MODULES + "activation.LogSoftmax": _softmax("log_softmax"),
    _MODULES + "normalization.LayerNorm": _layer_norm,
    _MODULES + "batchnorm.BatchNorm1d": _batch_norm,
    _MODULES + "batchnorm.BatchNorm2d": _batch_norm,
}
