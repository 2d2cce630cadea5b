# SPDX-License-Identifier: Apache-2.0
"""What Python reads back from a store (block maps, graphs): damaged or made up, it is refused with
a pydedup error, never with another exception, and never half read. (Pages, blocks and the
similarity index are read by the core: csrc/fuzz.)"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pydedup.blocks import BlockGrid, BlockMap
from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.graph import Graph
from pydedup.operations import OPS
from pydedup.types import DType

NAMES = st.sampled_from(["x", "y", "h", "w", "b", ""])


def block_map(grid: BlockGrid, pages: int, slots: int, seed: int, deltas: float = 0) -> BlockMap:
    rng = np.random.default_rng(seed)
    page_ids = rng.integers(1, pages + 1, (2, grid.count), np.int64)
    places = rng.integers(0, slots, (2, grid.count)).astype(np.uint32)
    is_delta = rng.random(grid.count) < deltas
    if not is_delta.any():
        return BlockMap(grid, DType.F32, page_ids[0], places[0])
    base_ids = np.where(is_delta, page_ids[1], -1)
    base_slots = np.where(is_delta, places[1], 0).astype(np.uint32)
    return BlockMap(grid, DType.F32, page_ids[0], places[0], base_ids, base_slots)


@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 40),
    pages=st.sampled_from([1, 7, 2**40]),
    slots=st.sampled_from([1, 100, 2**20]),
    seed=st.integers(0, 99),
    deltas=st.sampled_from([0, 0.1, 1]),
)
@settings(max_examples=100)
def test_block_maps_come_back(
    rows: int, cols: int, pages: int, slots: int, seed: int, deltas: float
) -> None:
    grid = BlockGrid(rows, cols, 4, 8)
    written = block_map(grid, pages, slots, seed, deltas)
    read = BlockMap.from_parts(list(written.parts()), grid, DType.F32)
    assert (read.page_ids == written.page_ids).all()
    assert (read.slots == written.slots).all()
    assert (read.bases is None) == (written.bases is None)
    if read.bases is not None and written.bases is not None:
        assert (read.bases[0] == written.bases[0]).all()
        assert (read.bases[1] == written.bases[1]).all()


@given(
    slots=st.sampled_from([9, 2**20]),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 60),
    extra=st.binary(max_size=20),
    deltas=st.sampled_from([0, 0.5]),
)
@settings(max_examples=400)
def test_damaged_block_maps_are_refused_or_whole(
    slots: int, changes: list[tuple[int, int]], cut: int, extra: bytes, deltas: float
) -> None:
    grid = BlockGrid(40, 40, 4, 8)
    (part,) = block_map(grid, 5, slots, 0, deltas).parts()
    damaged = bytearray(part[: max(0, len(part) - cut)] + extra)
    for at, value in changes:
        if damaged:
            damaged[at % len(damaged)] = value
    try:
        read = BlockMap.from_parts([bytes(damaged)], grid, DType.F32)
    except CorruptStoreError:
        return
    assert read.page_ids.dtype == np.int64
    assert read.slots.dtype == np.uint32
    assert len(read.page_ids) == len(read.slots) == grid.count
    if read.bases is not None:
        assert (read.bases[0].dtype, read.bases[1].dtype) == (np.int64, np.uint32)
        assert len(read.bases[0]) == len(read.bases[1]) == grid.count


@given(st.lists(st.binary(max_size=60), max_size=3))
def test_bytes_that_are_no_block_map_are_refused(parts: list[bytes]) -> None:
    try:
        BlockMap.from_parts(parts, BlockGrid(8, 8, 4, 8), DType.F32)
    except CorruptStoreError:
        return
    raise AssertionError("two blocks came from nowhere")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
ATTRS = sorted({name for spec in OPS.values() for name in spec.attrs})
NODE = st.fixed_dictionaries(
    {
        "op": st.sampled_from(sorted(OPS)),
        "inputs": st.lists(NAMES, max_size=3),
        "output": NAMES,
        "weights": st.dictionaries(
            st.sampled_from(["weight", "bias", "mean", "var", "v"]), NAMES, max_size=4
        ),
        "attrs": st.dictionaries(st.sampled_from(ATTRS), JSON, max_size=3),
    }
)
GRAPH = st.fixed_dictionaries(
    {
        "version": st.just(1),
        "inputs": st.lists(NAMES, max_size=2),
        "outputs": st.lists(NAMES, max_size=2),
        "nodes": st.lists(NODE, max_size=3),
        "shapes": st.dictionaries(NAMES, st.lists(st.integers(-2, 3), max_size=3), max_size=1),
    }
)


def read_graph(text: str | bytes) -> None:
    try:
        graph = Graph.from_json(text)
    except ArgumentError:
        return
    # What is accepted can be written, and says the same again.
    assert Graph.from_json(graph.to_json()) == graph
    with contextlib.suppress(ArgumentError):
        graph.validate(dict.fromkeys(graph.tensors(), (4, 4)))


def chain(op: str, **attrs: Any) -> dict[str, Any]:
    node = {"op": op, "inputs": ["x"], "output": "y", "weights": {}, "attrs": attrs}
    return {"version": 1, "inputs": ["x"], "outputs": ["y"], "nodes": [node]}


@given(GRAPH)
@settings(max_examples=400)
@example(chain("leaky_relu", alpha=10**400))  # raised OverflowError
@example(chain("gelu", approximate=[]))
@example(chain("mean", axis=[10**30]))
@example(chain("reshape", shape=[-1, 10**30]))
@example(chain("transpose", perm=[{}]))
def test_graphs_of_right_form_and_any_content(data: dict[str, Any]) -> None:
    read_graph(json.dumps(data))


@given(GRAPH, st.sampled_from(["version", "inputs", "outputs", "nodes"]), JSON)
@settings(max_examples=300)
def test_graphs_of_wrong_form(data: dict[str, Any], key: str, value: object) -> None:
    read_graph(json.dumps(data | {key: value}))


@given(NODE, st.sampled_from(["op", "inputs", "output", "weights", "attrs", "more"]), JSON)
@settings(max_examples=300)
def test_nodes_of_wrong_form(node: dict[str, Any], key: str, value: object) -> None:
    read_graph(
        json.dumps(
            {"version": 1, "inputs": ["x"], "outputs": ["y"], "nodes": [node | {key: value}]}
        )
    )


@given(st.binary(max_size=80) | st.text(max_size=80))
@example(b"\xff\xfe\x00")
@example("[" * 100_000)
@example("1" * 5000)
def test_what_is_no_graph_at_all(text: str | bytes) -> None:
    read_graph(text)
