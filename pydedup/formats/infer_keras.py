# SPDX-License-Identifier: Apache-2.0
"""The layers of a Keras model from its config, for Sequential and Functional models.

Configs of Keras 2 and 3 differ in how they write shapes and connections; both are read. A layer,
option or connection without an exact counterpart gives no graph.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydedup.errors import ArgumentError
from pydedup.graph import AttrValue, Graph, Node

__all__ = ["infer_from_keras", "unknown_layers"]

_DROPPED = {
    "Dropout",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "GaussianDropout",
    "GaussianNoise",
    "AlphaDropout",
    "ActivityRegularization",
}
#: Options under which a layer computes with other weights than its kernel.
_REWRITES = ("lora_rank", "quantization_mode", "quantization_config")
_MERGES = {"Add": "add", "Multiply": "mul", "Subtract": "sub"}
#: Names of activations -> operation and attributes.
_ACTIVATIONS: Mapping[str, tuple[str, dict[str, AttrValue]]] = {
    "relu": ("relu", {}),
    "sigmoid": ("sigmoid", {}),
    "tanh": ("tanh", {}),
    "silu": ("silu", {}),
    "swish": ("silu", {}),
    "gelu": ("gelu", {"approximate": "none"}),
    "elu": ("elu", {"alpha": 1.0}),
    "softplus": ("softplus", {}),
    "softmax": ("softmax", {"axis": -1}),
    "log_softmax": ("log_softmax", {"axis": -1}),
}


class _UnknownError(Exception):
    """A layer or option has no exact counterpart."""


def infer_from_keras(
    config: Mapping[str, Any], layer_weights: Mapping[str, Sequence[str]]
) -> Graph | None:
    """Return the graph of a Keras config, or ``None`` when it cannot be exact.

    ``layer_weights`` maps layer names to tensor names in the order of ``layer.weights``.
    """
    try:
        return _Translation(layer_weights).model(config)
    except (
        *(_UnknownError, ArgumentError, KeyError, TypeError, IndexError, AttributeError),
        *(ValueError, OverflowError),
    ):
        # The config is foreign JSON: whatever does not look as expected is unknown.
        return None


def unknown_layers(payload: bytes) -> list[str]:
    """Return the classes of layers that have no graph in any case, of a config as Keras wrote it.

    None for a config that is not as expected.
    """
    try:
        config = json.loads(payload)["config"]
        # Keras before 2.2.3 wrote the layers of a Sequential model as they are.
        layers = config["layers"] if isinstance(config, dict) else config
        kinds = {layer["class_name"] for layer in layers}
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    known = {"InputLayer", "Concatenate", *_DROPPED, *_MERGES, *_TRANSLATE}
    return sorted(kind for kind in kinds - known if isinstance(kind, str))


class _Translation:
    """One pass over the layers of a model. Tracks ranks, on which some options depend."""

    def __init__(self, layer_weights: Mapping[str, Sequence[str]]) -> None:
        self._weights = layer_weights
        self._nodes: list[Node] = []
        self._ranks: dict[str, int | None] = {}

    def model(self, config: Mapping[str, Any]) -> Graph:
        kind, inner = config["class_name"], config["config"]
        if kind == "Sequential":
            return self._sequential(inner if isinstance(inner, Mapping) else {"layers": inner})
        if kind in ("Functional", "Model"):
            return self._functional(inner)
        raise _UnknownError

    def _sequential(self, config: Mapping[str, Any]) -> Graph:
        value = "input"
        self._ranks[value] = _rank(config)
        for index, layer in enumerate(config["layers"]):
            if layer["class_name"] == "InputLayer":
                if index:
                    raise _UnknownError
                self._ranks[value] = _rank(layer["config"]) or self._ranks[value]
                continue
            if index == 0:
                self._ranks[value] = _rank(layer["config"]) or self._ranks[value]
            value = self._layer(layer, (value,))
        if not self._nodes:
            raise _UnknownError
        return self._graph(("input",), (value,))

    def _functional(self, config: Mapping[str, Any]) -> Graph:
        values: dict[str, str] = {}
        inputs: list[str] = []
        for layer in config["layers"]:
            name = layer.get("name") or layer["config"]["name"]
            calls = layer.get("inbound_nodes") or []
            if layer["class_name"] == "InputLayer":
                inputs.append(name)
                values[name] = name
                self._ranks[name] = _rank(layer["config"])
                continue
            if len(calls) != 1:  # shared layers
                raise _UnknownError
            sources = tuple(values[source] for source in _sources(calls[0]))
            values[name] = self._layer(layer, sources)
        order = [_history(item)[0] for item in _flat_ends(config["input_layers"])]
        if sorted(order) != sorted(inputs):
            raise _UnknownError
        outputs = tuple(values[_history(item)[0]] for item in _flat_ends(config["output_layers"]))
        return self._graph(tuple(order), outputs)

    def _graph(self, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Graph:
        graph = Graph(inputs, outputs, tuple(self._nodes))
        ranks = {name: self._ranks.get(name) for name in inputs}
        shapes = {name: (-1,) * rank for name, rank in ranks.items() if rank is not None}
        # Sizes are for Keras to check; what counts axes needs to know how many there are.
        return replace(graph, shapes=shapes) if graph.counts_axes() else graph

    def _layer(self, layer: Mapping[str, Any], sources: tuple[str, ...]) -> str:
        """Append what a layer does and return the value that it makes."""
        kind, config = layer["class_name"], layer["config"]
        name = config["name"]
        if kind in _DROPPED:
            (source,) = sources
            return source
        if kind in _MERGES:
            ranks = [self._ranks.get(source) for source in sources]
            # Keras lets an input of fewer axes have further ones after the batch, not before it.
            if len(sources) != 2 or ranks[0] is None or ranks[0] != ranks[1]:
                raise _UnknownError
            return self._add(_MERGES[kind], name, sources)
        if kind == "Concatenate":
            return self._add("concat", name, sources, attrs={"axis": config["axis"]})
        translate = _TRANSLATE.get(kind)
        if translate is None or len(sources) != 1:
            raise _UnknownError
        return translate(self, name, config, sources[0])

    def _add(
        self,
        op: str,
        output: str,
        inputs: tuple[str, ...],
        weights: Mapping[str, str] | None = None,
        attrs: Mapping[str, AttrValue] | None = None,
        *,
        rank: int | None = None,
    ) -> str:
        """Append a node; ``rank`` is that of its value, by default that of its first input."""
        self._nodes.append(Node(op, inputs, output, weights or {}, attrs or {}))
        self._ranks[output] = self._ranks.get(inputs[0]) if rank is None else rank
        return output

    def _tensors(self, name: str, roles: Sequence[str]) -> dict[str, str]:
        tensors = self._weights.get(name, ())
        if len(tensors) != len(roles):
            raise _UnknownError
        return dict(zip(roles, tensors, strict=True))

    def _activate(self, name: str, activation: object, value: str) -> str:
        if activation in (None, "linear"):
            return value
        if not isinstance(activation, str) or activation not in _ACTIVATIONS:
            raise _UnknownError
        op, attrs = _ACTIVATIONS[activation]
        return self._add(op, name, (value,), attrs=attrs)

    # ---- layers -------------------------------------------------------------------------------

    def _dense(self, name: str, config: Mapping[str, Any], source: str) -> str:
        if any(config.get(option) for option in _REWRITES):
            raise _UnknownError
        roles = ("weight", "bias") if config["use_bias"] else ("weight",)
        activation = config["activation"]
        output = name if activation in (None, "linear") else f"{name}/linear"
        weights = self._tensors(name, roles)
        self._add("linear", output, (source,), weights, {"transpose": True})
        return self._activate(name, activation, output)

    def _embedding(self, name: str, config: Mapping[str, Any], source: str) -> str:
        # With mask_zero, later layers leave masked words out.
        if config.get("mask_zero") or any(config.get(option) for option in _REWRITES):
            raise _UnknownError
        rank = self._ranks.get(source)
        weights = self._tensors(name, ("weight",))
        return self._add(
            "embedding", name, (source,), weights, rank=None if rank is None else rank + 1
        )

    def _flatten(self, name: str, config: Mapping[str, Any], source: str) -> str:
        _channels_last(config)
        return self._add("flatten", name, (source,), attrs={"start_axis": 1}, rank=2)

    def _pool(self, name: str, config: Mapping[str, Any], source: str) -> str:
        _channels_last(config)
        keep = bool(config.get("keepdims", False))
        attrs: dict[str, AttrValue] = {"axis": 1, "keepdims": keep}
        return self._add("mean", name, (source,), attrs=attrs, rank=3 if keep else 2)

    def _activation(self, name: str, config: Mapping[str, Any], source: str) -> str:
        return self._activate(name, config["activation"], source)

    def _relu(self, name: str, config: Mapping[str, Any], source: str) -> str:
        if config.get("max_value") is not None or config.get("threshold"):
            raise _UnknownError
        slope = config.get("negative_slope") or 0.0
        if slope:
            return self._add("leaky_relu", name, (source,), attrs={"alpha": slope})
        return self._add("relu", name, (source,))

    def _leaky_relu(self, name: str, config: Mapping[str, Any], source: str) -> str:
        alpha = _number(config["negative_slope" if "negative_slope" in config else "alpha"])
        return self._add("leaky_relu", name, (source,), attrs={"alpha": alpha})

    def _elu(self, name: str, config: Mapping[str, Any], source: str) -> str:
        attrs: dict[str, AttrValue] = {"alpha": _number(config["alpha"])}
        return self._add("elu", name, (source,), attrs=attrs)

    def _softmax(self, name: str, config: Mapping[str, Any], source: str) -> str:
        attrs: dict[str, AttrValue] = {"axis": _axis(config)}
        return self._add("softmax", name, (source,), attrs=attrs)

    def _batch_norm(self, name: str, config: Mapping[str, Any], source: str) -> str:
        if not config["scale"] or not config["center"] or config.get("renorm"):
            raise _UnknownError
        weights = self._tensors(name, ("weight", "bias", "mean", "var"))
        rank = self._ranks.get(source)
        axis = _axis(config)
        if rank is not None and axis in (-1, rank - 1):
            axis = rank - 1
        attrs: dict[str, AttrValue] = {"eps": float(config["epsilon"]), "axis": axis}
        return self._add("batch_norm", name, (source,), weights, attrs)

    def _layer_norm(self, name: str, config: Mapping[str, Any], source: str) -> str:
        if not config["scale"] or not config["center"] or config.get("rms_scaling"):
            raise _UnknownError
        rank = self._ranks.get(source)
        if _axis(config) not in (-1, None if rank is None else rank - 1):
            raise _UnknownError
        weights = self._tensors(name, ("weight", "bias"))
        attrs: dict[str, AttrValue] = {"axes": 1, "eps": float(config["epsilon"])}
        return self._add("layer_norm", name, (source,), weights, attrs)

    def _reshape(self, name: str, config: Mapping[str, Any], source: str) -> str:
        target = list(config["target_shape"])
        if -1 in target:  # the batch is the other unknown
            raise _UnknownError
        return self._add(
            "reshape", name, (source,), attrs={"shape": [0, *target]}, rank=len(target) + 1
        )

    def _permute(self, name: str, config: Mapping[str, Any], source: str) -> str:
        perm = [0, *config["dims"]]
        return self._add("transpose", name, (source,), attrs={"perm": perm}, rank=len(perm))


def _rank(config: Mapping[str, Any]) -> int | None:
    for key in ("batch_shape", "batch_input_shape", "build_input_shape"):
        if isinstance(config.get(key), list):
            return len(config[key])
    return None


def _axis(config: Mapping[str, Any]) -> int:
    axis = config["axis"]
    if isinstance(axis, list):
        (axis,) = axis
    return int(axis)


def _number(value: object) -> float:
    # Keras 2 writes some numbers as arrays: {"class_name": "__numpy__", ...} is not read.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _UnknownError
    return float(value)


def _channels_last(config: Mapping[str, Any]) -> None:
    if config.get("data_format") not in (None, "channels_last"):
        raise _UnknownError


def _sources(call: Any) -> list[str]:
    """Return the names of the layers that one call of a layer takes its inputs from."""
    if isinstance(call, Mapping):  # Keras 3
        arguments = call["args"]
        tensors = arguments[0] if isinstance(arguments[0], list) else arguments
        for value in call.get("kwargs", {}).values():
            # Another tensor, a mask, or training=True: noise, and statistics of the batch.
            if value not in (None, False):
                raise _UnknownError
        histories = [item["config"]["keras_history"] for item in tensors]
    else:  # Keras 2: [[layer, node, tensor, kwargs], ...]
        histories = [item[:3] for item in call]
        if any(len(item) > 3 and item[3] for item in call):
            raise _UnknownError
    return [_history(item)[0] for item in histories]


def _history(item: Sequence[Any]) -> tuple[str, int, int]:
    layer, node, tensor = item
    if node != 0 or tensor != 0:
        raise _UnknownError
    return layer, node, tensor


def _flat_ends(ends: Any) -> list[Any]:
    """Return the list of [layer, node, tensor]; Keras 3 writes a single one without the list."""
    if ends and isinstance(ends[0], str):
        return [ends]
    return list(ends)


_TRANSLATE: Mapping[str, Callable[[_Translation, str, Mapping[str, Any], str], str]] = {
    "Dense": _Translation._dense,
    "Embedding": _Translation._embedding,
    "Flatten": _Translation._flatten,
    "GlobalAveragePooling1D": _Translation._pool,
    "Activation": _Translation._activation,
    "ReLU": _Translation._relu,
    "LeakyReLU": _Translation._leaky_relu,
    "ELU": _Translation._elu,
    "Softmax": _Translation._softmax,
    "BatchNormalization": _Translation._batch_norm,
    "LayerNormalization": _Translation._layer_norm,
    "Reshape": _Translation._reshape,
    "Permute": _Translation._permute,
}
