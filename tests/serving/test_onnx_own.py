# SPDX-License-Identifier: Apache-2.0
"""ONNX models that are asked again: sessions of ONNX Runtime with their weights inside."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup.errors import BudgetError
from pydedup.serving import onnx_kept, onnx_own, onnx_session
from pydedup.testing.serving import until

from .onnx_models import X, node, normal, onnx, run, save, stack, value

MIB = 1 << 20
SHAPES = {"w": (64, 512), "v": (512, 300), "bias": (300,)}


def drawn() -> dict[str, NDArray[np.float32]]:
    return {name: normal(*shape) for name, shape in SHAPES.items()}


def own_sessions(store: pydedup.Store) -> Mapping[int, Any]:
    return onnx_kept.runner_of(store._pool)._own


def check(store: pydedup.Store, model: str, path: Path, **inputs: NDArray[Any]) -> None:
    given: Any = inputs or {"x": X}
    wanted = run(path, **given)
    for _ in range(3):
        np.testing.assert_allclose(store.predict(model, given)["y"], wanted, rtol=1e-3, atol=1e-4)


def test_a_model_that_is_asked_again(store: pydedup.Store, tmp_path: Path) -> None:
    path = stack(tmp_path, "m.onnx", drawn())
    store.add("m", path)
    store.predict("m", X)
    before = store.stats().pool["reserved_bytes"]
    assert not own_sessions(store)
    check(store, "m", path)
    ((own,),) = [own_sessions(store).values()]
    nbytes = sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    more = store.stats().pool["reserved_bytes"] - before
    assert nbytes <= more < nbytes + 1000  # and the graph
    assert [value.name for value in own.runtime.get_inputs()] == ["x"]


def test_tables_are_shared(store: pydedup.Store, tmp_path: Path) -> None:
    """Rows are looked up where they are; another use of a table makes it a weight."""
    nodes = [
        *(node("Gather", "table x", "rows", axis=0), node("Gather", "both x", "others", axis=0)),
        *(node("MatMul", "rows w", "a"), node("MatMul", "others turned", "b")),
        *(node("Transpose", "both", "turned"), node("Concat", "a b", "c", axis=2)),
        node("Sin", "c", "y"),
    ]
    weights = {"table": normal(900, 64), "both": normal(50, 64), "w": normal(64, 80)}
    path = save(tmp_path / "m.onnx", nodes, weights, [value("x", 7, ("b", "n"))])
    store.add("m", path)
    check(store, "m", path, x=np.array([[3, 899, 0], [1, 2, 2]]) % 50)
    ((own,),) = [own_sessions(store).values()]
    assert own.graph.tables == {"table"}
    assert [value.name for value in own.runtime.get_inputs()] == ["x", "table"]
    nbytes = 4 * (50 * 64 + 64 * 80)
    assert nbytes <= own.reservation.nbytes < nbytes + 2000  # and the graph


def test_a_model_of_tables_alone_gets_none(store: pydedup.Store, tmp_path: Path) -> None:
    nodes = [node("Gather", "table x", "rows", axis=0), node("Sin", "rows", "y")]
    path = save(tmp_path / "m.onnx", nodes, {"table": normal(90, 64)}, [value("x", 7, ("n",))])
    store.add("m", path)
    check(store, "m", path, x=np.array([3, 89, 0]))
    assert not own_sessions(store)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.uint8])
def test_constants_of_all_types(store: pydedup.Store, tmp_path: Path, dtype: Any) -> None:
    weights = {"w": (np.abs(normal(64, 80)) * 100).astype(dtype)}
    nodes = [node("Cast", "w", "f", to=1), node("MatMul", "x f", "a"), node("Sin", "a", "y")]
    path = save(tmp_path / "m.onnx", nodes, weights)
    store.add("m", path)
    check(store, "m", path)


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_quantised_products(store: pydedup.Store, tmp_path: Path, kind: Any) -> None:
    nodes = [
        node("DynamicQuantizeLinear", "x", "q s z"),
        node("MatMulInteger", "q w z point", "i"),
        node("Cast", "i", "f", to=1),
        *(node("Mul", "f s", "a"), node("Mul", "a scale", "y")),
    ]
    nodes[0].output[:] = ["q", "s", "z"]
    weights = {
        "w": (normal(64, 300) * 300).clip(0, 127).astype(kind),
        "point": np.zeros((), kind),
        "scale": np.abs(normal(300)),
    }
    path = save(tmp_path / "m.onnx", nodes, weights)
    store.add("m", path)
    check(store, "m", path)
    assert own_sessions(store)


def test_a_model_of_the_first_versions(store: pydedup.Store, tmp_path: Path) -> None:
    """All of their weights are inputs as well, which others may be given for."""
    path = stack(tmp_path, "m.onnx", drawn())
    model = onnx.load(path)
    model.ir_version = 3
    del model.opset_import[1:]
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in model.graph.initializer
    )
    onnx.save(model, path)
    store.add("m", path)
    check(store, "m", path)
    assert own_sessions(store)


def test_a_runtime_that_takes_no_constants(
    store: pydedup.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stack(tmp_path, "m.onnx", drawn())
    store.add("m", path)
    tried = []

    def refuse(*args: Any) -> bytes:
        tried.append(args)
        return b"no model"

    monkeypatch.setattr(onnx_own, "with_constants", refuse)
    store.predict("m", X)
    before = store.stats().pool["reserved_bytes"]
    check(store, "m", path)
    assert len(tried) == 1
    assert store.stats().pool["reserved_bytes"] == before


@pytest.mark.parametrize("differs", ["v", "bias"])
def test_they_take_half_of_the_budget(tmp_path: Path, differs: str) -> None:
    """Also where it is them that take the most, as of models with equal weights."""
    weights = {"w": normal(64, 2048), "v": normal(2048, 64), "bias": normal(64)}  # 1 MiB
    shape = weights[differs].shape
    paths = [stack(tmp_path, f"{i}.onnx", {**weights, differs: normal(*shape)}) for i in range(12)]
    with pydedup.open(tmp_path / "small.db", memory="24MiB") as store:
        for path in paths:
            store.add(path.stem, path)
        for path in [*paths, *paths]:
            check(store, path.stem, path)
            own = own_sessions(store).values()
            assert sum(one.reservation.nbytes for one in own) <= store._pool.memory_bytes // 2
            assert store.stats().pool["bytes"] <= 24 * MIB
        assert len(own) >= 2


def test_they_make_room(tmp_path: Path) -> None:
    """For pages and for weights; where that happens, fewer of them are made."""
    small = {"w": normal(64, 1024), "v": normal(1024, 64), "bias": normal(64)}  # 512 KiB
    paths = [stack(tmp_path, f"{i}.onnx", {**small, "v": normal(1024, 64)}) for i in range(4)]
    large = {"w": normal(64, 8000), "v": normal(8000, 64), "bias": normal(64)}  # 4 MB
    with pydedup.open(tmp_path / "small.db", memory="12MiB") as store:
        for path in paths:
            store.add(path.stem, path)
        path = stack(tmp_path, "large.onnx", large)
        store.add("large", path)
        for one in paths:
            check(store, one.stem, one)
        assert own_sessions(store)
        runner = onnx_kept.runner_of(store._pool)
        most = runner._most_own
        check(store, "large", path)
        while own_sessions(store):
            assert runner.give_up()
        assert runner._most_own is not None
        assert most is not None
        assert runner._most_own < most
        for one in [*paths, path]:
            check(store, one.stem, one)
        assert not own_sessions(store)


def without_room(store: pydedup.Store) -> AbstractContextManager[object]:
    """Leave room in memory for the weights of `drawn` once and a half."""
    nbytes = sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    stats = store.stats().pool
    return store._pool.reserve(stats["budget_bytes"] - stats["bytes"] - nbytes * 3 // 2)


def test_one_is_made_where_there_is_room_twice(store: pydedup.Store, tmp_path: Path) -> None:
    """The runtime has what it was given until all is laid out."""
    path = stack(tmp_path, "m.onnx", drawn())
    store.add("m", path)
    store.predict("m", X)
    with without_room(store):
        before = store.stats().pool["reserved_bytes"]
        check(store, "m", path)
        assert not own_sessions(store)
        assert store.stats().pool["reserved_bytes"] == before


def test_one_is_made_once_there_is_room(store: pydedup.Store, tmp_path: Path) -> None:
    """Many calls later, so that what is for nothing is rare; what runs it is right until then."""
    path = stack(tmp_path, "m.onnx", drawn())
    store.add("m", path)
    store.predict("m", X)
    with without_room(store):
        check(store, "m", path)
        assert not own_sessions(store)
    made = 0
    while not own_sessions(store):
        check(store, "m", path)
        made += 1
        assert made < 100
    assert made > 1
    check(store, "m", path)


def test_they_have_their_part_of_the_budget_again_after_some_calm(tmp_path: Path) -> None:
    paths = [stack(tmp_path, f"{i}.onnx", drawn()) for i in range(3)]  # 728 KB each
    with pydedup.open(tmp_path / "small.db", memory="12MiB") as store:
        for path in paths:
            store.add(path.stem, path)
            check(store, path.stem, path)
        runner = onnx_kept.runner_of(store._pool)
        for _ in paths:
            assert runner.give_up()  # as where others need the room
        assert runner._most_own is not None
        assert runner._most_own < 1 << 20
        for _ in range(600):
            for path in paths:
                store.predict(path.stem, X)
            if len(own_sessions(store)) == len(paths):
                break
        assert len(own_sessions(store)) == len(paths)
        for path in paths:
            check(store, path.stem, path)


def test_one_is_not_made_where_its_graph_has_no_room(
    store: pydedup.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stack(tmp_path, "m.onnx", drawn())
    store.add("m", path)
    store.predict("m", X)

    def refuse(*_: Any) -> None:
        raise BudgetError("no room")

    monkeypatch.setattr(onnx_session, "opened_graph", refuse)
    check(store, "m", path)
    assert not own_sessions(store)


def test_who_was_asked_last_stays(store: pydedup.Store, tmp_path: Path) -> None:
    paths = [stack(tmp_path, f"{i}.onnx", drawn()) for i in range(2)]
    for path in paths:
        store.add(path.stem, path)
    check(store, "0", paths[0])
    (first,) = own_sessions(store)
    check(store, "1", paths[1])
    check(store, "0", paths[0])
    assert onnx_kept.runner_of(store._pool).give_up()
    assert list(own_sessions(store)) == [first]


def test_few_are_kept(
    store: pydedup.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_kept, "_KEPT", 2)
    paths = []
    for width in (100, 200, 300):  # each has another graph
        weights = {"w": normal(64, width), "v": normal(width, 8), "bias": normal(8)}
        paths.append(stack(tmp_path, f"{width}.onnx", weights))
        store.add(paths[-1].stem, paths[-1])
    runner = onnx_kept.runner_of(store._pool)
    for path in [*paths, *paths]:
        check(store, path.stem, path)
        for kept in (runner._models, runner._sessions, runner._own, runner._turns):
            assert len(kept) <= 2  # type: ignore[arg-type]


def test_an_alias_that_moves_and_a_vacuum(store: pydedup.Store, tmp_path: Path) -> None:
    first, second = (stack(tmp_path, f"{i}.onnx", drawn()) for i in range(2))
    store.add("m@1", first)
    store.alias("m", "prod", "1")
    check(store, "m@prod", first)
    store.add("m@2", second)
    store.alias("m", "prod", "2")
    check(store, "m@prod", second)
    check(store, "m@1", first)
    store.remove("m@1")
    store.vacuum()
    check(store, "m@prod", second)
    store.add("m@1", second)
    check(store, "m@1", second)


def test_threads_that_ask_at_once(store: pydedup.Store, tmp_path: Path) -> None:
    paths = [stack(tmp_path, f"{i}.onnx", drawn()) for i in range(3)]
    for path in paths:
        store.add(path.stem, path)
    began = threading.Barrier(4)

    def predict(first: int) -> None:
        began.wait()
        for number in range(first, first + 6):
            check(store, str(number % 3), paths[number % 3])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(predict, range(4)))
    assert len(own_sessions(store)) == 3


def test_a_forked_child_makes_its_own(store: pydedup.Store, tmp_path: Path) -> None:
    path = stack(tmp_path, "m.onnx", drawn())
    store.add("m", path)
    x = normal(1000, 64)  # so large that the runtime uses its threads
    check(store, "m", path, x=x)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        wanted = store.predict("m", x)
        same = all(np.allclose(store.predict("m", x), wanted, atol=1e-4) for _ in range(3))
        os._exit(0 if same and own_sessions(store) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_who_runs_while_it_is_given_up(store: pydedup.Store, tmp_path: Path) -> None:
    path = stack(tmp_path, "m.onnx", drawn())
    store.add("m", path)
    check(store, "m", path)
    runner = onnx_kept.runner_of(store._pool)
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(lambda: [check(store, "m", path) for _ in range(40)])
        for _ in range(200):
            runner.give_up()
        until(done.done)
    done.result()
