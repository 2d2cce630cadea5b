# SPDX-License-Identifier: Apache-2.0
"""Three models whose rows are exchanged, and what is to be said of that."""

from __future__ import annotations

import numpy as np

import pydedup
from pydedup.graph import Graph, Node

from .damage import change

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 64), np.float32)
MODELS = {
    name: {key: RNG.standard_normal((64, 64), np.float32) for key in ("a", "b")}
    for name in ("one", "two", "three")
}
GRAPH = Graph(
    ("x",),
    ("z",),
    (
        Node("linear", ("x",), "y", {"weight": "a"}),
        Node("linear", ("y",), "z", {"weight": "b"}),
    ),
)
TELLS = "its block map is not the one that was recorded"


def fill(url: str) -> None:
    with pydedup.open(url) as store:
        for name, model in MODELS.items():
            store.add(name, model, graph=GRAPH)


def is_there(store: pydedup.Store, *names: str) -> None:
    for name in names:
        loaded = store.load(name)
        assert all(np.array_equal(loaded[key], array) for key, array in MODELS[name].items())


def exchange_maps(url: str, first: tuple[int, int], second: tuple[int, int]) -> None:
    """Exchange the block maps of two tensors, each an id of a model and an ordinal."""
    told = "UPDATE {block_maps} SET model_id = ?, ordinal = ? WHERE model_id = ? AND ordinal = ?"
    for new, old in (((999, 9), first), (first, second), (second, (999, 9))):
        change(url, told, *new, *old)
