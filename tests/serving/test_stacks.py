# SPDX-License-Identifier: Apache-2.0
"""Dense layers that run as one native call, against the same layers one by one.

The first prediction of a model takes its layers one by one, later ones run them together.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pydedup
from pydedup import _core, policies
from pydedup.errors import ArgumentError, PydedupError
from pydedup.graph import Graph, Node
from pydedup.matmul import blocks_in, shape_of
from pydedup.serving.stacks import Stacks, chains, stacks_of

RNG = np.random.default_rng(11)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[pydedup.Store]:
    with pydedup.open(tmp_path / "s.db", memory="64MiB") as opened:
        yield opened


def linear(x: str, to: str, *, bias: bool = False, **attrs: Any) -> Node:
    names = {"weight": f"{to}.weight", **({"bias": f"{to}.bias"} if bias else {})}
    return Node("linear", (x,), to, weights=names, attrs=attrs)


def net(*nodes: Node, outputs: tuple[str, ...] = ()) -> Graph:
    return Graph(("x",), outputs or (nodes[-1].output,), nodes)


def stacks(store: pydedup.Store, name: str) -> Stacks:
    """Return what runs a model that was predicted with."""
    model = store._catalog.model(name)
    graph = model.graph()
    assert graph is not None
    stacks_of(model, graph, store._stored_tensor, store._pool)  # is met for the first time
    return stacks_of(model, graph, store._stored_tensor, store._pool)


# ---- which layers -------------------------------------------------------------------------------

A, B, C = linear("x", "a"), linear("ra", "b"), linear("rb", "c")
RA, RB = Node("relu", ("a",), "ra"), Node("relu", ("b",), "rb")
SOFTMAX = Node("softmax", ("c",), "s")
SIDE = Node("tanh", ("ra",), "side")


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (net(A, RA, B, RB, C), [("x", "c", 3)]),
        (net(A, RA, B, RB, C, SOFTMAX), [("x", "c", 3)]),
        (net(A, RA), [("x", "ra", 1)]),
        (net(A, linear("a", "b"), RB), [("x", "rb", 2)]),
        (net(A, RA, B, RB, C, outputs=("ra", "c")), [("x", "ra", 1), ("ra", "c", 2)]),
        (net(A, RA, B, RB, C, outputs=("a", "c")), [("x", "a", 1), ("ra", "c", 2)]),
        (net(A, RA, B, Node("add", ("b", "ra"), "s")), [("x", "ra", 1), ("ra", "b", 1)]),
        (net(A, Node("softmax", ("a",), "ra"), B), [("x", "a", 1), ("ra", "b", 1)]),
        (net(Node("relu", ("x",), "ra"), B), [("ra", "b", 1)]),
        (net(Node("relu", ("x",), "r")), []),
    ],
)
def test_chains(graph: Graph, expected: list[tuple[str, str, int]]) -> None:
    found = chains(graph)
    assert [(one.input, one.output, len(one.steps)) for one in found] == expected
    for one in found:
        assert one.output in one.made
        assert one.input not in one.made


# ---- what they give -----------------------------------------------------------------------------


def weights(dtypes: list[Any], sizes: list[int], bias: Any, transpose: bool) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for name, dtype, inner, outer in zip("abc", dtypes, sizes, sizes[1:], strict=False):
        shape = (inner, outer) if transpose else (outer, inner)
        values = RNG.standard_normal(shape) * (8 if np.dtype(dtype).kind == "i" else 0.1)
        arrays[f"{name}.weight"] = values.astype(dtype)
        if bias is not None:
            arrays[f"{name}.bias"] = (RNG.standard_normal(outer) * 9).astype(bias)
    return arrays


@pytest.mark.parametrize("shape", [(1, 70), (3, 70), (40, 70), (70,), (2, 3, 70)])
@pytest.mark.parametrize(
    ("dtypes", "bias", "transpose"),
    [
        ([np.float32] * 3, None, False),
        ([np.float32] * 3, np.float32, False),
        ([np.float32] * 3, np.int64, True),
        ([np.float64] * 3, np.float32, False),
        ([ml_dtypes.bfloat16, np.float16, np.int8], ml_dtypes.bfloat16, False),
    ],
)
def test_bits_are_those_of_the_layers_one_by_one(
    store: pydedup.Store, dtypes: list[Any], bias: Any, transpose: bool, shape: tuple[int, ...]
) -> None:
    sizes = [70, 130, 65, 3]
    nodes = [
        linear(x, to, bias=bias is not None, transpose=transpose)
        for x, to in (("x", "a"), ("ra", "b"), ("rb", "c"))
    ]
    graph = net(nodes[0], RA, nodes[1], Node("tanh", ("b",), "rb"), nodes[2])
    store.add("m", weights(dtypes, sizes, bias, transpose), graph=graph)
    wide = RNG.standard_normal(shape)
    given = (np.float32, np.float64, np.int16, ml_dtypes.bfloat16)
    for x in ((9 * wide).astype(dtype) for dtype in given):
        store._catalog.model("m").refresh()  # met for the first time again
        expected = store.predict("m", x)
        ran = stacks(store, "m").run("a", {"x": x})
        assert ran is not None
        np.testing.assert_array_equal(ran[1], expected)
        got = store.predict("m", x)
        np.testing.assert_array_equal(got, expected)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)


@pytest.mark.parametrize(
    ("graph", "whole"),
    [
        (net(A, RA, B), "a"),
        (net(A), "a"),
        (net(A, RA, B, outputs=("ra", "b")), None),  # two chains
        (net(A, RA, B, SIDE), None),
        (net(A, RA, B, SIDE, outputs=("b",)), None),  # of which nobody needs the last
        (net(Node("relu", ("x",), "h"), linear("h", "a"), RA, B), None),
        (Graph(("x", "unused"), ("b",), (A, RA, B)), None),
        (Graph(("x",), ("b",), (A, RA, B), ("b",)), None),
    ],
)
def test_a_graph_that_is_one_chain(store: pydedup.Store, graph: Graph, whole: str | None) -> None:
    arrays = weights([np.float32] * 2, [8, 6, 5], None, False)
    store.add("m", arrays, graph=graph)
    x = RNG.standard_normal((3, 8)).astype(np.float32)
    inputs: Any = x if len(graph.inputs) == 1 else {"x": x, "unused": x}
    first = store.predict("m", inputs)
    found = stacks(store, "m")
    assert found.whole == whole
    values = {"x": x}
    ran = found.run_whole(values)
    if whole is None:
        assert ran is None
    else:
        assert ran is not None
        np.testing.assert_array_equal(ran[graph.outputs[0]], first)
        assert found.run_whole({"y": x}) is None
        assert found.run_whole({**values, "y": x}) is None
    for _ in range(2):
        np.testing.assert_equal(store.predict("m", inputs), first)
    for wrong in ({"y": x}, {"x": x, "y": x}):
        with pytest.raises(ArgumentError, match=r"unknown input 'y'"):
            store.predict("m", wrong)


def test_no_rows(store: pydedup.Store) -> None:
    store.add("m", {"a.weight": np.ones((3, 4), np.float32)}, graph=net(A))
    for _ in range(3):
        assert store.predict("m", np.zeros((0, 4), np.float32)).shape == (0, 3)


def test_between_other_layers(store: pydedup.Store) -> None:
    graph = Graph(
        ("ids",),
        ("s", "e"),
        (
            Node("embedding", ("ids",), "e", weights={"weight": "table"}),
            linear("e", "a", bias=True),
            RA,
            linear("ra", "c"),
            SOFTMAX,
        ),
        ("s",),
    )
    arrays = {
        "table": RNG.standard_normal((50, 16)).astype(np.float32),
        "a.weight": RNG.standard_normal((32, 16)).astype(np.float32),
        "a.bias": RNG.standard_normal(32).astype(np.float32),
        "c.weight": RNG.standard_normal((4, 32)).astype(np.float32),
    }
    store.add("m", arrays, graph=graph)
    ids = RNG.integers(0, 50, (5, 7))
    first = store.predict("m", {"ids": ids})
    assert list(stacks(store, "m").found) == ["a"]
    for _ in range(2):
        again = store.predict("m", {"ids": ids})
        for name in ("s", "e"):
            np.testing.assert_array_equal(again[name], first[name])
            assert again[name].dtype == (np.float16 if name == "s" else np.float32)


def test_deltas(store: pydedup.Store) -> None:
    base = weights([np.float32] * 2, [128, 192, 64], np.float32, False)
    near = {name: value + np.float32(1e-3) * RNG.random() for name, value in base.items()}
    store.add("base", base, policy=policies.Exact())
    nodes = linear("x", "a", bias=True), RA, linear("ra", "b", bias=True)
    store.add("near", near, graph=net(*nodes), policy=policies.Lossless())
    assert store._catalog.model("near").block_map("a.weight").bases is not None
    x = RNG.standard_normal((2, 128)).astype(np.float32)
    first = store.predict("near", x)
    ran = stacks(store, "near").run("a", {"x": x})
    assert ran is not None
    np.testing.assert_array_equal(ran[1], first)


# ---- where they cannot run ----------------------------------------------------------------------


def test_calls_that_read_nothing_count(tmp_path: Path) -> None:
    """Which pages stay is by how often their models are called."""
    with pydedup.open(tmp_path / "s.db", memory="8MiB") as store:
        for name in "abcdef":
            weight = RNG.standard_normal((512, 1024)).astype(np.float32)
            store.add(name, {"a.weight": weight}, graph=net(A))
        x = np.ones((1, 1024), np.float32)
        for _ in range(300):
            store.predict("a", x)
        for name in "bcdef":
            for _ in range(4):  # more often than without the last ones of those
                store.predict(name, x)
        pages = [store._catalog.model(name).page_ids() for name in "ab"]
        there = [store._pool.native.count_resident(ids) for ids in pages]
        assert there[0] > there[1]


def test_what_is_wrong_is_told_as_ever(store: pydedup.Store) -> None:
    store.add("m", weights([np.float32] * 2, [8, 6, 5], None, False), graph=net(A, RA, B))
    wrong: list[tuple[Any, str]] = [
        (np.zeros((2, 7), np.float32), "m@1 takes 8 features, and x has 7"),
        (np.zeros((2, 8), np.complex64), "node 'linear' that makes 'a': x must hold real numbers"),
        (np.float32(1), r"node 'linear' that makes 'a': x has shape \(\)"),
    ]
    right = np.ones((2, 8), np.float32)
    expected = store.predict("m", right)
    for _ in range(2):
        for x, said in wrong:
            with pytest.raises(ArgumentError, match=said):
                store.predict("m", x)
        np.testing.assert_array_equal(store.predict("m", right), expected)


def test_the_core_refuses_what_makes_no_layers(store: pydedup.Store) -> None:
    store.add("m", {"a.weight": np.ones((6, 8), np.float32)}, graph=net(A))
    x = np.ones((2, 8), np.float32)
    store.predict("m", x)
    block_map, pool = store._catalog.model("m").block_map("a.weight"), store._pool
    windows = [
        blocks_in(window, block_map) for window in pool.planned(block_map.page_ids, block_map.bases)
    ]
    ids = np.unique(block_map.page_ids)
    layer = (*shape_of(block_map), None, "relu", False, windows)
    made = _core.Stack([layer], ids).run(pool.native, x)
    np.testing.assert_array_equal(made, np.full((2, 6), 8, np.float32))
    wrong: list[tuple[list[Any], Any]] = [
        ([], x),
        ([layer[:-1]], x),
        ([(*layer[:-1], [None])], x),
        ([(*layer[:-1], [])], x),
        ([layer, layer], x),
        ([(*layer[:5], np.ones(5, np.float32), *layer[6:])], x),
        ([(*layer[:6], "rely", *layer[7:])], x),
        ([(*layer[:4], 99, *layer[5:])], x),
        ([layer], x[0]),
        ([layer], x.astype(np.float64)),
        ([layer], x[:, :7]),
        ([layer], np.ones((8, 2), np.float32).T),
    ]
    for layers, given in wrong:
        with pytest.raises((PydedupError, TypeError, RuntimeError)):
            _core.Stack(layers, ids).run(pool.native, given)
    assert _core.Stack([layer], ids + 1000).run(pool.native, x) is None
    half = _core.Stack([layer], ids).run(pool.native, x, as_bf16=True)
    assert half is not None
    np.testing.assert_array_equal(half, np.full((2, 6), 0x4100, np.uint16))  # 8


def test_layers_that_do_not_go_together_are_no_stack(store: pydedup.Store) -> None:
    mixed = weights([np.float32, np.float64], [8, 6, 5], None, False)
    store.add("mixed", mixed, graph=net(A, RA, B))
    x = np.ones((2, 8), np.float32)
    expected = store.predict("mixed", x)
    assert not stacks(store, "mixed").found
    np.testing.assert_array_equal(store.predict("mixed", x), expected)
    assert expected.dtype == np.float64


def test_large_ones_are_no_stack(tmp_path: Path) -> None:
    """Neither those of more pages than a window, nor those with long vectors."""
    wide = {"a.weight": RNG.random((1024, 1024), np.float32)}
    long = {"a.weight": np.ones((20_000, 2), np.float32), "a.bias": np.ones(20_000, np.float32)}
    with pydedup.open(tmp_path / "l.db", memory="8MiB") as store:
        store.add("wide", wide, graph=net(A))
        store.add("long", long, graph=net(linear("x", "a", bias=True)))
        for name, inner in (("wide", 1024), ("long", 2)):
            x = np.ones((1, inner), np.float32)
            expected = store.predict(name, x)
            assert not stacks(store, name).found
            np.testing.assert_array_equal(store.predict(name, x), expected)


def test_pages_that_went_away_are_read_again(tmp_path: Path) -> None:
    arrays = weights([np.float32] * 2, [64, 96, 8], np.float32, False)
    nodes = linear("x", "a", bias=True), RA, linear("ra", "b", bias=True)
    with pydedup.open(tmp_path / "p.db", memory="16MiB") as store:
        store.add("m", arrays, graph=net(*nodes))
        x = RNG.standard_normal((2, 64)).astype(np.float32)
        expected = store.predict("m", x)
        found = stacks(store, "m")
        assert found.run("a", {"x": x}) is not None
        store._pool.clear()
        assert found.run("a", {"x": x}) is None
        np.testing.assert_array_equal(store.predict("m", x), expected)
        assert found.run("a", {"x": x}) is not None


def test_a_model_that_a_vacuum_moved(store: pydedup.Store) -> None:
    graph = net(A, RA, B)
    arrays = weights([np.float32] * 2, [256, 512, 8], None, False)
    store.add("other", {**arrays, "more": RNG.standard_normal((512, 512))})  # on one page with it
    store.add("m", arrays, graph=graph)
    x = RNG.standard_normal((2, 256)).astype(np.float32)
    expected = [store.predict("m", x) for _ in range(3)][-1]
    store.remove("other")
    assert store.vacuum().rewritten_pages > 0
    for _ in range(3):
        np.testing.assert_array_equal(store.predict("m", x), expected)
    assert stacks(store, "m").run("a", {"x": x}) is not None  # on the pages that it has now


def test_threads_share_a_small_budget(tmp_path: Path) -> None:
    """More models than fit, so that pages go while others use theirs."""
    graph = net(A, RA, B)
    models = {f"m{i}": weights([np.float32] * 2, [256, 900, 4], None, False) for i in range(8)}
    x = RNG.standard_normal((2, 256)).astype(np.float32)
    with pydedup.open(tmp_path / "t.db") as store:
        for name, arrays in models.items():
            store.add(name, arrays, graph=graph)
        expected = {name: store.predict(name, x) for name in models}

    def predict(number: int) -> None:
        name = f"m{number % 8}"
        np.testing.assert_array_equal(store.predict(name, x), expected[name])

    with pydedup.open(tmp_path / "t.db", mode="r", memory="8MiB") as store:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(predict, [*range(8)] * 30 + [3] * 60))
        assert store.stats().pool["evictions"] > 0


def test_uses_are_recorded(store: pydedup.Store) -> None:
    store.add("m", weights([np.float32] * 2, [8, 6, 5], None, False), graph=net(A, RA, B))
    x = np.ones((2, 8), np.float32)
    counts = []
    for _ in range(3):
        store.record()
        store.predict("m", x)
        counts.append(len(store.recorded().pages))
        store.record(0)
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 2
