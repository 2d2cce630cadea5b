# SPDX-License-Identifier: Apache-2.0
"""Predictions that are text, as classifiers of scikit-learn give their labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup

from .conftest import FEATURES, Tables, features, predictions, query_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Make = Callable[..., str]

LABELS = ["a", "b\u00e9", 'c"']


def classifier(path: Path, outputs: list[Any]) -> np.ndarray:
    """Save a linear classifier with these of its outputs."""
    make = onnx.helper
    weight = np.random.default_rng(0).standard_normal((3, FEATURES)).astype(np.float32)
    nodes = [
        make.make_node(
            "LinearClassifier",
            ["x"],
            ["label", "p"],
            domain="ai.onnx.ml",
            coefficients=weight.ravel().tolist(),
            intercepts=[0.0] * 3,
            classlabels_strings=LABELS,
        ),
        make.make_node("Constant", [], ["shape"], value_ints=[-1, 1]),
        make.make_node("Reshape", ["label", "shape"], ["column"]),
        make.make_node("Concat", ["column", "column"], ["twice"], axis=1),
    ]
    takes = make.make_tensor_value_info("x", 1, ["n", FEATURES])
    graph = make.make_graph(nodes, "g", [takes], outputs)
    opsets = [make.make_opsetid("", 17), make.make_opsetid("ai.onnx.ml", 1)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return weight


def test_labels_are_written_as_text(
    tables: Tables, source: Make, new_name: Make, tmp_path: Path
) -> None:
    """Were an unexpected TypeError, of isfinite."""
    output = onnx.helper.make_tensor_value_info
    label, p, twice = output("label", 8, ["n"]), output("p", 1, ["n", 3]), output("twice", 8, None)
    forms = {"label": [label], "both": [label, p], "twice": [twice]}
    with pydedup.open(tables.url) as store:
        for name, outputs in forms.items():
            weight = classifier(tmp_path / "m.onnx", outputs)
            store.add(name, tmp_path / "m.onnx")
    x = features(20)
    table, none = source(x), source(x[:0])
    wanted = [LABELS[i] for i in (x @ weight.T).argmax(axis=1)]
    made: dict[str, list[Any]] = {}
    with pydedup.open(tables.url) as store:
        for name in forms:
            into = new_name()
            store.score(query_of(none), name, into=into)  # the same table is made where no row is
            assert store.score(query_of(table), name, into=into, batch=8).rows == 20
            found = predictions(tables, into)
            made[name] = [found[i + 1] for i in range(20)]
    assert made["label"] == wanted
    both = list(map(json.loads, made["both"]))
    assert [one["label"] for one in both] == wanted
    np.testing.assert_allclose([one["p"] for one in both], x @ weight.T, 1e-4, 1e-5)
    assert list(map(json.loads, made["twice"])) == [[one, one] for one in wanted]
