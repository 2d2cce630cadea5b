# SPDX-License-Identifier: Apache-2.0
"""Graphs inferred from configs of Keras, computed against what they say.

Keras itself is no test dependency: the configs were shortened from files that Keras 3.15 and 2
wrote, and the expected values are computed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pydedup
from pydedup.errors import ArgumentError
from pydedup.formats.infer_keras import infer_from_keras
from pydedup.graph import Graph
from pydedup.testing.graphs import compute

Array = npt.NDArray[Any]
RNG = np.random.default_rng(3)


def _dense(name: str, units: int, activation: str = "linear", **more: Any) -> dict[str, Any]:
    config = {"name": name, "units": units, "activation": activation, "use_bias": True, **more}
    return {"class_name": "Dense", "config": config}


def _layer(kind: str, name: str, **config: Any) -> dict[str, Any]:
    return {"class_name": kind, "config": {"name": name, **config}}


def _sequential(*layers: dict[str, Any]) -> dict[str, Any]:
    return {"class_name": "Sequential", "config": {"name": "sequential", "layers": list(layers)}}


KERAS_TENSORS: dict[str, Array] = {
    "e": RNG.standard_normal((9, 4)),
    "k": RNG.standard_normal((4, 3)),
    "b": RNG.standard_normal(3),
    "k2": RNG.standard_normal((3, 3)),
    "gamma": RNG.standard_normal(3),
    "beta": RNG.standard_normal(3),
    "mean": RNG.standard_normal(3),
    "var": RNG.random(3) + 0.5,
}
WEIGHTS = {
    "embedding": ["e"],
    "dense": ["k", "b"],
    "second": ["k2", "b"],
    "bn": ["gamma", "beta", "mean", "var"],
    "ln": ["gamma", "beta"],
}


@pytest.mark.parametrize("style", ["keras-2", "keras-3"])
def test_keras_sequential(style: str) -> None:
    if style == "keras-3":
        start = [_layer("InputLayer", "in", batch_shape=[None, 5])]
        leaky = _layer("LeakyReLU", "leaky", negative_slope=0.25)
        axis: Any = -1
    else:
        start = [_layer("InputLayer", "in", batch_input_shape=[None, 5])]
        leaky = _layer("LeakyReLU", "leaky", alpha=0.25)
        axis = [1]
    config = _sequential(
        *start,
        _layer("Embedding", "embedding", input_dim=9, output_dim=4, mask_zero=False),
        _layer("GlobalAveragePooling1D", "pool", data_format="channels_last", keepdims=False),
        _dense("dense", 3, "relu"),
        _layer("Dropout", "dropout", rate=0.5),
        _layer("BatchNormalization", "bn", axis=axis, epsilon=0.001, scale=True, center=True),
        leaky,
        _layer("LayerNormalization", "ln", axis=axis, epsilon=0.01, scale=True, center=True),
        _dense("second", 3, "softmax"),
    )
    graph = infer_from_keras(config, WEIGHTS)
    assert graph is not None
    graph.validate({name: array.shape for name, array in KERAS_TENSORS.items()})
    t, x = KERAS_TENSORS, RNG.integers(0, 9, (2, 5))
    h = np.maximum(t["e"][x].mean(1) @ t["k"] + t["b"], 0)
    h = (h - t["mean"]) / np.sqrt(t["var"] + 0.001) * t["gamma"] + t["beta"]
    h = np.where(h > 0, h, 0.25 * h)
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 0.01)
    h = (h * t["gamma"] + t["beta"]) @ t["k2"] + t["b"]
    expected = np.exp(h) / np.exp(h).sum(1, keepdims=True)
    np.testing.assert_allclose(compute(graph, t, x)[0], expected, rtol=1e-9)


@pytest.mark.parametrize("style", ["keras-2", "keras-3"])
def test_keras_functional_with_two_branches(style: str) -> None:
    def called(*sources: str) -> list[Any]:
        if style == "keras-2":
            return [[[source, 0, 0, {}] for source in sources]]
        tensors = [
            {"class_name": "__keras_tensor__", "config": {"keras_history": [source, 0, 0]}}
            for source in sources
        ]
        return [{"args": tensors if len(tensors) == 1 else [tensors], "kwargs": {}}]

    layers = [
        {**_layer("InputLayer", "in", batch_shape=[None, 4]), "name": "in", "inbound_nodes": []},
        {**_dense("dense", 3, "tanh"), "name": "dense", "inbound_nodes": called("in")},
        {**_dense("second", 3), "name": "second", "inbound_nodes": called("dense")},
        {**_layer("Subtract", "sub"), "name": "sub", "inbound_nodes": called("dense", "second")},
        {
            **_layer("Concatenate", "cat", axis=-1),
            "name": "cat",
            "inbound_nodes": called("sub", "in"),
        },
    ]
    ends: tuple[Any, Any] = ([["in", 0, 0]], [["cat", 0, 0]])
    if style == "keras-3":
        ends = (["in", 0, 0], ["cat", 0, 0])
    inner = {"name": "m", "layers": layers, "input_layers": ends[0], "output_layers": ends[1]}
    graph = infer_from_keras({"class_name": "Functional", "config": inner}, WEIGHTS)
    assert graph is not None
    t, x = KERAS_TENSORS, RNG.standard_normal((2, 4))
    h = np.tanh(x @ t["k"] + t["b"])
    expected = np.concatenate([h - (h @ t["k2"] + t["b"]), x], 1)
    np.testing.assert_allclose(compute(graph, t, x)[0], expected, rtol=1e-9)
    layers[1]["inbound_nodes"] *= 2  # a layer that is called twice
    assert infer_from_keras({"class_name": "Functional", "config": inner}, WEIGHTS) is None


@pytest.mark.parametrize(
    ("kwargs", "known"),
    [
        ({}, True),
        ({"training": False, "mask": None}, True),
        ({"training": True}, False),
        ({"mask": {"class_name": "__keras_tensor__", "config": {}}}, False),
    ],
)
def test_what_a_keras_layer_is_called_with(kwargs: dict[str, Any], known: bool) -> None:
    """Called as in training, it takes the statistics of each batch, and we took those it had."""
    tensor = {"class_name": "__keras_tensor__", "config": {"keras_history": ["in", 0, 0]}}
    norm = _layer("BatchNormalization", "bn", axis=-1, epsilon=1e-3, scale=True, center=True)
    layers = [
        {**_layer("InputLayer", "in", batch_shape=[None, 3]), "name": "in", "inbound_nodes": []},
        {**norm, "name": "bn", "inbound_nodes": [{"args": [tensor], "kwargs": kwargs}]},
    ]
    inner = {"layers": layers, "input_layers": ["in", 0, 0], "output_layers": ["bn", 0, 0]}
    graph = infer_from_keras({"class_name": "Functional", "config": inner}, WEIGHTS)
    assert (graph is not None) == known


def test_a_keras_row_is_computed_along_the_axes_of_a_batch(tmp_path: Path) -> None:
    """A mean over words was one over what they are embedded in; a Reshape mixed rows."""
    words = _sequential(
        _layer("InputLayer", "in", batch_shape=[None, 5]),
        _layer("Embedding", "embedding", input_dim=9, output_dim=4, mask_zero=False),
        _layer("GlobalAveragePooling1D", "pool", data_format="channels_last", keepdims=False),
    )
    folded = _sequential(
        _layer("InputLayer", "in", batch_shape=[None, 16]),
        _layer("Reshape", "reshape", target_shape=[4, 4]),
        _dense("dense", 3),
    )
    with pydedup.open(tmp_path / "store.db") as store:
        for name, config in (("words", words), ("folded", folded)):
            graph = infer_from_keras(config, WEIGHTS)
            assert graph is not None
            tensors = {name: KERAS_TENSORS[name] for name in graph.tensors()}
            store.add(name, tensors, graph=graph)
        for name, x in (("words", RNG.integers(0, 9, (3, 5))), ("folded", RNG.random((3, 16)))):
            batch = store.predict(name, x)
            np.testing.assert_allclose(store.predict(name, x[1]), batch[1], 1e-9)
        for name, given in (("words", (2, 3, 5)), ("folded", (2, 32)), ("folded", (4, 8))):
            with pytest.raises(ArgumentError, match=r"axes|reshape"):
                store.predict(name, np.zeros(given, int if name == "words" else float))


IN = _layer("InputLayer", "in", batch_shape=[None, 4])


@pytest.mark.parametrize(
    "config",
    [
        _sequential(IN, _layer("LSTM", "lstm", units=3)),
        _sequential(IN, _dense("dense", 3, "mish")),
        _sequential(IN, _dense("dense", 3, {"class_name": "Custom"})),  # type: ignore[arg-type]
        _sequential(IN, _dense("dense", 3, lora_rank=4)),
        _sequential(IN, _dense("unnamed", 3)),
        _sequential(IN, _layer("Embedding", "embedding", mask_zero=True)),
        _sequential(IN, _layer("GlobalAveragePooling1D", "p", data_format="channels_first")),
        _sequential(IN, _layer("ReLU", "r", max_value=6.0)),
        _sequential(IN, _layer("BatchNormalization", "bn", axis=-1, epsilon=1.0, scale=False)),
        _sequential(
            IN, _layer("LayerNormalization", "ln", axis=0, epsilon=1.0, scale=True, center=True)
        ),
        _sequential(IN),
        _sequential(IN, _sequential(_dense("dense", 3))),
        _sequential(IN, _layer("Softmax", "s", axis=[1, 2])),
        _sequential(IN, _layer("Softmax", "s", axis=float("inf"))),
        _sequential(
            IN, _layer("BatchNormalization", "bn", axis=[1, 2], epsilon=1, scale=True, center=True)
        ),
        _sequential(
            IN, _layer("LayerNormalization", "ln", axis=[1, 2], epsilon=1, scale=True, center=True)
        ),
        {"class_name": "MyModel", "config": {}},
        {"class_name": "Sequential"},
        {},
    ],
)
def test_unknown_keras_models_have_no_graph(config: dict[str, Any]) -> None:
    assert infer_from_keras(config, WEIGHTS) is None


@pytest.mark.parametrize("kind", ["Add", "Multiply", "Subtract"])
@pytest.mark.parametrize("other", [(None, 4), None])
def test_keras_merges_of_unequal_or_unknown_ranks_have_no_graph(
    kind: str, other: tuple[int | None, ...] | None
) -> None:
    def layer(kind: str, name: str, *sources: str, **config: Any) -> dict[str, Any]:
        calls = [[[source, 0, 0, {}] for source in sources]] if sources else []
        return {**_layer(kind, name, **config), "name": name, "inbound_nodes": calls}

    def infer(shape: tuple[int | None, ...] | None) -> Graph | None:
        more = {} if shape is None else {"batch_shape": list(shape)}
        layers = [
            layer("InputLayer", "a", batch_shape=[None, 4, 4]),
            layer("InputLayer", "b", **more),
            layer(kind, "merge", "a", "b"),
        ]
        ends = {"input_layers": [["a", 0, 0], ["b", 0, 0]], "output_layers": [["merge", 0, 0]]}
        inner = {"name": "m", "layers": layers, **ends}
        return infer_from_keras({"class_name": "Functional", "config": inner}, {})

    assert infer((None, 4, 4)) is not None
    assert infer(other) is None
