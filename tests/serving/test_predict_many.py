# SPDX-License-Identifier: Apache-2.0
"""Many requests at once, and batches larger than the budget, against predictions one by one."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup.errors import ArgumentError, BudgetError, NotFoundError
from pydedup.graph import Graph, Node

RNG = np.random.default_rng(9)
WIDE = 512


def layers() -> Graph:
    return Graph(
        ("x",),
        ("out",),
        (
            Node("linear", ("x",), "h", weights={"weight": "a.weight", "bias": "a.bias"}),
            Node("relu", ("h",), "r"),
            Node("linear", ("r",), "logits", weights={"weight": "b.weight", "bias": "b.bias"}),
            Node("softmax", ("logits",), "out", attrs={"axis": -1}),
        ),
    )


def weights() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(1)
    return {
        "a.weight": rng.standard_normal((WIDE, 256)).astype(np.float32) / 16,
        "a.bias": rng.standard_normal(WIDE).astype(np.float32),
        "b.weight": rng.standard_normal((10, WIDE)).astype(np.float32) / 16,
        "b.bias": rng.standard_normal(10).astype(np.float32),
    }


@pytest.fixture
def store(tmp_path: Path) -> Iterator[pydedup.Store]:
    """Six variants, each with rows of its own."""
    with pydedup.open(tmp_path / "m.db", memory="8MiB") as opened:
        for number in range(6):
            arrays = weights()
            arrays["a.weight"][number * 64 : number * 64 + 40] += number + 1
            arrays["b.bias"] += number
            opened.add(f"v{number}", arrays, graph=layers())
        yield opened


def test_mixed_requests_get_their_own_models_answers(store: pydedup.Store) -> None:
    requests = [
        (f"v{number % 6}", RNG.standard_normal((number % 4 + 1, 256)).astype(np.float32))
        for number in range(20)
    ]
    for (name, x), got in zip(requests, store.predict_many(requests), strict=True):
        np.testing.assert_allclose(got, store.predict(name, x), rtol=1e-4, atol=1e-5)
        assert got.base is None or got.base.nbytes == got.nbytes


@pytest.mark.parametrize(
    ("names", "rows", "calls", "models"),
    [
        (["v0", "v1"], 3, {2}, 2),
        (["v0", "v0", "v0"], 3, {1}, 1),
        (["v0", "v1", "v2"], 700, {1, 2, 3}, 3),  # more than half of what activations may take
    ],
)
def test_requests_go_together_as_far_as_the_budget_allows(
    store: pydedup.Store, names: list[str], rows: int, calls: set[int], models: int
) -> None:
    x = RNG.standard_normal((rows, 256)).astype(np.float32)
    wanted = [store.predict(name, x) for name in names]
    store.record(1 << 16)
    found = store.predict_many([(name, x) for name in names])
    trace = store.recorded()
    assert set(trace.calls.tolist()) == calls  # each use of a page, by the calls begun before
    assert len(trace.owners) == models
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_bad_request_does_not_disturb_the_others(store: pydedup.Store) -> None:
    good = RNG.standard_normal((2, 256)).astype(np.float32)
    results = store.predict_many(
        [
            ("v0", good),
            ("nobody", good),
            ("v1", good[:, :100]),
            ("v2", {"x": good}),
            ("v3", {"y": good}),
            ("v4", [[1.0], [1.0, 2.0]]),
            ("v5@9", good),
        ]
    )
    np.testing.assert_allclose(results[0], store.predict("v0", good), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results[3]["out"], store.predict("v2", good), rtol=1e-4, atol=1e-5)
    assert [type(results[i]) for i in (1, 2, 4, 5, 6)] == [
        NotFoundError,
        ArgumentError,
        ArgumentError,
        ArgumentError,
        NotFoundError,
    ]
    assert str(results[2]) == "v1@1 takes 256 features, and x has 100"
    assert store.predict_many([]) == []


def test_a_batch_whose_result_no_memory_holds_does_not_disturb_the_others(
    store: pydedup.Store,
) -> None:
    good = RNG.standard_normal((2, 256)).astype(np.float32)
    huge = np.broadcast_to(np.float32(0), (1 << 44, 256))  # its result takes 640 TiB
    failed, made = store.predict_many([("v0", huge), ("v1", good)])
    assert isinstance(failed, BudgetError)
    assert "no memory for the result" in str(failed)
    np.testing.assert_array_equal(made, store.predict("v1", good))


def test_models_with_other_layers_run_beside_each_other(store: pydedup.Store) -> None:
    other = Graph(("x",), ("h",), layers().nodes[:1])
    store.add("short", weights(), graph=other)
    x = RNG.standard_normal((3, 256)).astype(np.float32)
    first, second = store.predict_many([("v0", x), ("short", x)])
    np.testing.assert_allclose(first, store.predict("v0", x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second, store.predict("short", x), rtol=1e-4, atol=1e-5)


def test_bags_of_one_model_are_not_put_one_behind_the_other(tmp_path: Path) -> None:
    """Offsets that begin with 0 again would be those of other bags."""
    x = RNG.standard_normal((2, 256)).astype(np.float32)
    requests = [
        ("m", {"ids": np.array([1, 2]), "offsets": np.array([0]), "x": x[:1]}),
        ("m", {"ids": np.array([3, 4, 5]), "offsets": np.array([0, 1]), "x": x}),
    ]
    arrays = {**weights(), "table": RNG.standard_normal((50, 256)).astype(np.float32)}
    with pydedup.open(tmp_path / "m.db", memory="8MiB") as opened:
        opened.add("m", arrays, graph=bags())
        for (name, given), got in zip(requests, opened.predict_many(requests), strict=True):
            want = opened.predict(name, given)["out"]
            np.testing.assert_allclose(got["out"], want, rtol=1e-4, atol=1e-6)


def test_requests_of_two_dtypes_keep_theirs(store: pydedup.Store) -> None:
    store.add("plain", weights(), graph=Graph(("x",), ("y",), (Node("relu", ("x",), "y"),)))
    requests = [("plain", np.ones((2, 3), dtype)) for dtype in (np.float32, np.float64)]
    assert [got.dtype for got in store.predict_many(requests)] == [np.float32, np.float64]


def test_a_batch_larger_than_the_budget_is_cut(store: pydedup.Store) -> None:
    x = RNG.standard_normal((6000, 256)).astype(np.float32)  # 12 MB of activations in a layer
    want = np.concatenate([store.predict("v1", x[at : at + 500]) for at in range(0, 6000, 500)])
    tracemalloc.start()
    got = store.predict("v1", x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert peak < 6 << 20
    assert store.predict("v1", x[:0]).shape == (0, 10)


def test_pieces_of_a_batch_are_put_together_in_their_dtype(store: pydedup.Store) -> None:
    wide = {name: array.astype(np.float64) for name, array in weights().items()}
    store.add("wide", wide, graph=layers())
    x = RNG.standard_normal((6000, 256))
    want = np.concatenate([store.predict("wide", x[at : at + 500]) for at in range(0, 6000, 500)])
    got = store.predict("wide", x)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_threads_share_a_small_budget(tmp_path: Path) -> None:
    """Deltas need two pages at once, whatever other threads compute and read ahead."""
    rng = np.random.default_rng(3)
    shapes = {"table": (6000, 64), "up": (2048, 64), "down": (16, 2048)}
    base = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    graph = Graph(
        ("x",),
        ("y",),
        (
            Node("embedding_bag", ("x",), "bags", weights={"weight": "table"}),
            Node("linear", ("bags",), "wide", weights={"weight": "up"}),
            Node("linear", ("wide",), "y", weights={"weight": "down"}),
        ),
    )
    names = [f"v{number}" for number in range(6)]
    with pydedup.open(tmp_path / "m.db", memory="64MiB") as opened:
        for name in names:
            moved = {
                key: (array * (1 + 1e-3 * rng.standard_normal(array.shape))).astype(np.float32)
                for key, array in base.items()
            }
            opened.add(name, moved, graph=graph)
        ids = rng.integers(0, 6000, (2000, 4))
        want = {name: opened.predict(name, ids) for name in names}
    with (
        pydedup.open(tmp_path / "m.db", mode="r", memory="8MiB") as opened,
        ThreadPoolExecutor(2) as threads,
    ):
        found = list(threads.map(lambda name: opened.predict(name, ids), names * 3))
    for name, got in zip(names * 3, found, strict=True):
        np.testing.assert_allclose(got, want[name], rtol=1e-4, atol=2e-3)  # of up to 1,000


def bags(**attrs: Any) -> Graph:
    """Bags with offsets, beside an input that has a row for each bag."""
    weights = {"weight": "table"}
    return Graph(
        ("ids", "offsets", "x"),
        ("out",),
        (
            Node("embedding_bag", ("ids", "offsets"), "bag", weights=weights, attrs=attrs),
            Node("add", ("bag", "x"), "sum"),
            Node("linear", ("sum",), "h", weights={"weight": "a.weight", "bias": "a.bias"}),
            Node("softmax", ("h",), "out"),
        ),
    )


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("with_end", [False, True])
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_bags_with_offsets_are_cut(
    tmp_path: Path, mode: str, with_end: bool, padding: int | None
) -> None:
    attrs = {"mode": mode, "padding_idx": padding, "include_last_offset": with_end}
    arrays = {**weights(), "table": RNG.standard_normal((50, 256)).astype(np.float32)}
    sizes = RNG.integers(0, 5, 6000)
    sizes[100:400] = 0
    sizes[[0, 700, -1]] = 0, 20_000, 0
    edges = np.concatenate(([0], np.cumsum(sizes)))
    ids = RNG.integers(0, 50, edges[-1] + 7 * with_end)
    x = RNG.standard_normal((6000, 256)).astype(np.float32)
    given = {"ids": ids, "offsets": edges if with_end else edges[:-1], "x": x}
    turned = np.concatenate(([0], np.cumsum(sizes[::-1])))  # of the same shape, with other bags
    other = {**given, "offsets": turned if with_end else turned[:-1]}
    with pydedup.open(tmp_path / "m.db", memory="8MiB") as opened:
        opened.add("m", arrays, graph=bags(**attrs))
        tracemalloc.start()
        got = opened.predict("m", given)["out"]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < got.nbytes + (6 << 20)
        got_other = opened.predict("m", other)["out"]
        none = {"ids": ids[:0], "offsets": edges[:with_end], "x": x[:0]}
        assert opened.predict("m", none)["out"].shape == (0, WIDE)
        for wrong in ({"x": x[1:]}, {"offsets": given["offsets"] + 1}):
            with pytest.raises(ArgumentError, match=r"node '(add|embedding_bag)'"):
                opened.predict("m", {**given, **wrong})
        two = opened.predict_many([("m", given), ("m", none)])
        np.testing.assert_array_equal(two[0]["out"], got)
        assert two[1]["out"].shape == (0, WIDE)
    with pydedup.open(tmp_path / "m.db", mode="r", memory="512MiB") as opened:
        want = opened.predict("m", given)["out"]
        want_other = opened.predict("m", other)["out"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got_other, want_other, rtol=1e-4, atol=1e-6)


MEMORY = """
import json, sys
import numpy as np
import pydedup
from pydedup.graph import Graph, Node
from pydedup.testing.resident import ResidentMemory

rng = np.random.default_rng(0)
shapes = {"table": (1000, 64), "w": (512, 64), "v": (1, 512)}
graph = Graph(("ids", "offsets"), ("y",), (
    Node("embedding_bag", ("ids", "offsets"), "a", {"weight": "table"}, {"padding_idx": 1}),
    Node("linear", ("a",), "b", {"weight": "w"}),
    Node("relu", ("b",), "r"),
    Node("linear", ("r",), "y", {"weight": "v"}),
))
with pydedup.open(sys.argv[1]) as store:
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    store.add("m", arrays, graph=graph)

with pydedup.open(sys.argv[1], mode="r", memory="32MiB") as store, ResidentMemory() as memory:
    store.predict("m", {"ids": np.arange(4), "offsets": np.array([0, 2])})
    peaks = []
    for count, size in ((200_000, 2), (20_000, 400)):
        ids = rng.integers(0, 1000, count * size, dtype=np.int32)
        offsets = np.arange(0, count * size, size)
        memory.forget()
        before = memory.now()
        y = store.predict("m", {"ids": ids, "offsets": offsets})["y"]
        assert y.shape == (count, 1)
        peaks.append(memory.peak() - before)
print(json.dumps(peaks))
"""


def test_memory_of_bags_with_offsets(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEMORY, str(tmp_path / "m.db")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)) < (32 + 64) << 20, done.stdout


def test_rows_that_depend_on_each_other_are_not_cut(store: pydedup.Store) -> None:
    nodes = (*layers().nodes[:3], Node("softmax", ("logits",), "out", attrs={"axis": 0}))
    store.add("across", weights(), graph=Graph(("x",), ("out",), nodes))
    x = RNG.standard_normal((6000, 256)).astype(np.float32)
    np.testing.assert_allclose(store.predict("across", x).sum(axis=0), np.ones(10), rtol=1e-3)
    one, two = store.predict_many([("across", x[:10]), ("across", x[10:12])])
    np.testing.assert_allclose(one.sum(axis=0), np.ones(10), rtol=1e-3)
    np.testing.assert_allclose(two.sum(axis=0), np.ones(10), rtol=1e-3)


def test_rows_are_not_cut_where_a_layer_that_no_output_needs_takes_all(
    store: pydedup.Store,
) -> None:
    rows = np.ones(6000, np.float32)
    norm = {"weight": "ones", "bias": "ones", "mean": "ones", "var": "ones"}
    unused = Node("batch_norm", ("h",), "unused", weights=norm, attrs={"axis": 0})
    nodes = (*layers().nodes[:1], unused, *layers().nodes[1:])
    store.add("more", {**weights(), "ones": rows}, graph=Graph(("x",), ("out",), nodes))
    store.add("less", weights(), graph=layers())
    x = RNG.standard_normal((6000, 256)).astype(np.float32)
    np.testing.assert_allclose(
        store.predict("more", x), store.predict("less", x), rtol=1e-4, atol=1e-6
    )
