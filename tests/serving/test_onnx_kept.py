# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime has ready of a store: kept for the next call, and given up for others."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.catalog import StoredModel
from pydedup.errors import BudgetError
from pydedup.graph import Graph, Node
from pydedup.serving import onnx_kept, onnx_own
from pydedup.testing.program import run_here
from pydedup.testing.serving import until

from .onnx_models import X, node, normal, run, save, stack


def test_sessions_and_equal_tensors_are_shared(store: pydedup.Store, tmp_path: Path) -> None:
    weights = {"w": normal(64, 80), "v": normal(80, 600), "bias": normal(600)}
    others = {**weights, "v": normal(80, 600)}
    paths = [stack(tmp_path, "1.onnx", weights), stack(tmp_path, "2.onnx", others)]
    for number, path in enumerate(paths, 1):
        store.add(f"m@{number}", path)
    runner, sessions = onnx_kept.runner_of(store._pool), []
    for number, path in enumerate(paths, 1):
        np.testing.assert_allclose(
            store.predict(f"m@{number}", X), run(path, x=X), rtol=1e-4, atol=1e-5
        )
        sessions.extend(runner._sessions.values())
    assert len(runner._sessions) == 1
    assert sessions[0] is sessions[1]
    assert len(runner._held) == 4  # w, bias, and two of v


def test_nothing_keeps_a_store_alive(tmp_path: Path) -> None:
    path = stack(tmp_path, "m.onnx", {"w": normal(64, 80), "v": normal(80, 9), "bias": normal(9)})
    with pydedup.open(tmp_path / "other.db") as store:
        store.add("m", path)
        store.predict("m", X)
    pool = weakref.ref(store._pool)
    del store
    gc.collect()
    assert pool() is None


def three_stacks(folder: Path) -> list[Path]:
    """Models of 2 MB each."""
    paths = []
    for number in range(3):
        weights = {"w": normal(64, 4096), "v": normal(4096, 64), "bias": normal(64)}
        paths.append(stack(folder, f"{number}.onnx", weights))
    return paths


def test_models_that_do_not_fit_at_once_wait_for_each_other(tmp_path: Path) -> None:
    paths = three_stacks(tmp_path)
    wanted = [run(path, x=X) for path in paths]
    with pydedup.open(tmp_path / "small.db", memory="7MiB") as store:
        for path in paths:
            store.add(path.stem, path)
        began = threading.Barrier(3)

        def predict(first: int) -> None:
            began.wait()
            for number in range(first, first + 6):
                got = store.predict(str(number % 3), X)
                np.testing.assert_allclose(got, wanted[number % 3], rtol=1e-3, atol=1e-4)

        with ThreadPoolExecutor(3) as threads:
            list(threads.map(predict, range(3)))


def test_a_call_waits_for_no_other(store: pydedup.Store, tmp_path: Path) -> None:
    store.add(
        "m", stack(tmp_path, "m.onnx", {"w": normal(64, 80), "v": normal(80, 9), "bias": X[0, :9]})
    )
    wanted = store.predict("m", X)
    calls = onnx_kept.runner_of(store._pool).calls
    with ThreadPoolExecutor(1) as threads, calls.hold(1):
        np.testing.assert_array_equal(threads.submit(store.predict, "m", X).result(60), wanted)


def test_graphs_and_weights_are_read_once(
    store: pydedup.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(
        "m", stack(tmp_path, "m.onnx", {"w": normal(64, 80), "v": normal(80, 9), "bias": X[0, :9]})
    )
    read = []
    artifact = StoredModel.artifact

    def noting(model: StoredModel, name: str) -> bytes | None:
        read.append(name)
        return artifact(model, name)

    monkeypatch.setattr(StoredModel, "artifact", noting)
    monkeypatch.setattr(onnx_own, "with_constants", lambda *_: b"no model")
    for _ in range(2):  # the second call tries a session of its own, of the graph read anew
        store.predict("m", X)
    assert read
    del read[:]
    held = onnx_kept.runner_of(store._pool)._held
    before = {key: id(one) for key, one in held.items()}
    for _ in range(3):
        store.predict("m", X)
    assert read == []
    assert before == {key: id(one) for key, one in held.items()}


def test_a_session_that_made_room_is_made_anew(
    store: pydedup.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_kept, "_LARGE_BYTES", 0)
    weights = {"w": normal(64, 80), "v": normal(80, 9), "bias": normal(9)}
    path = stack(tmp_path, "m.onnx", weights)
    store.add("m", path)
    runner = onnx_kept.runner_of(store._pool)
    for _ in range(2):
        np.testing.assert_allclose(store.predict("m", X), run(path, x=X), rtol=1e-4, atol=1e-5)
        while runner.give_up():
            pass
        assert not runner._sessions


def test_a_session_that_makes_room_is_gone_when_memory_goes_back(
    store: pydedup.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is shared was freed only after free memory had been given back."""
    monkeypatch.setattr(onnx_kept, "_LARGE_BYTES", 0)
    weights = {"w": normal(64, 80), "v": normal(80, 9), "bias": normal(9)}
    store.add("m", stack(tmp_path, "m.onnx", weights))
    for _ in range(2):
        store.predict("m", X)
    runner = onnx_kept.runner_of(store._pool)
    left = [weakref.ref(one.runtime) for one in (*runner._own.values(), *runner._sessions.values())]
    alive: list[int] = []

    def give_back() -> None:
        alive.append(sum(session() is not None for session in left))

    monkeypatch.setattr(onnx_kept, "give_back_freed", give_back)
    assert len(left) == 2, "one with the weights inside, and the shared one"
    while runner.give_up():
        pass
    assert alive == [1, 0]


def test_what_was_not_used_for_longest_makes_room(store: pydedup.Store, tmp_path: Path) -> None:
    for number in range(2):
        weights = {"w": normal(64, 80), "v": normal(80, 9), "bias": normal(9)}
        store.add(str(number), stack(tmp_path, "m.onnx", weights))
    runner = onnx_kept.runner_of(store._pool)
    store.predict("0", X)
    first = list(runner._held)
    for name in "10":
        store.predict(name, X)
    while runner._own:
        assert runner.give_up()
    for _ in first:
        assert runner.give_up()
    assert list(runner._held) == first


def test_weights_make_room_for_pages(tmp_path: Path) -> None:
    """What ONNX Runtime was given is kept for its next call, and no page can be read beside it."""
    path = three_stacks(tmp_path)[0]
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    base = normal(700, 700)
    variant = base + normal(700, 700) / 1000  # of blocks that need their bases, on other pages
    with pydedup.open(tmp_path / "small.db", memory="7MiB") as store:
        store.add("by-runtime", path)
        store.add("base", {"w": base}, graph=graph)
        assert store.add("variant", {"w": variant}, graph=graph).delta_blocks > 100
        x = normal(3, 700)
        for _ in range(2):
            np.testing.assert_allclose(
                store.predict("by-runtime", X), run(path, x=X), rtol=1e-3, atol=1e-4
            )
            assert store.stats().pool["reserved_bytes"] > 2 << 20
            np.testing.assert_allclose(
                store.predict("variant", x), x @ variant.T, rtol=1e-3, atol=1e-3
            )
        # Of a call that is under way, they are waited for, also while it loads others.
        store.predict("by-runtime", X)
        runner = onnx_kept.runner_of(store._pool)
        with ThreadPoolExecutor(1) as threads, runner.calls.hold(1):
            used = list(runner._held.values())
            pending = threads.submit(store.predict, "variant", x)
            until(lambda: bool(runner.calls._waiting))
            used.clear()
        np.testing.assert_allclose(pending.result(), x @ variant.T, rtol=1e-3, atol=1e-3)


def test_weights_make_room_for_those_of_other_models(tmp_path: Path) -> None:
    paths = three_stacks(tmp_path)
    with pydedup.open(tmp_path / "small.db", memory="7MiB") as store:
        for path in paths:
            store.add(path.stem, path)
        for path in [*paths, *paths]:
            np.testing.assert_allclose(
                store.predict(path.stem, X), run(path, x=X), rtol=1e-3, atol=1e-4
            )
            assert store.stats().pool["reserved_bytes"] < 4 << 20


def test_what_can_never_fit_is_in_nobodys_way(tmp_path: Path) -> None:
    """It waited for the calls of others, and took their weights out of memory, to fail then."""
    paths = three_stacks(tmp_path)
    two = {"w": normal(64, 9000), "v": normal(9000, 64), "bias": normal(64)}
    with pydedup.open(tmp_path / "small.db", memory="7MiB") as store:
        store.add("0", paths[0])
        store.add("large", stack(tmp_path, "large.onnx", two))
        store.predict("0", X)
        runner = onnx_kept.runner_of(store._pool)
        before = list(runner._held)
        message = "large@1 is run by ONNX Runtime, .* 4,608,256 bytes of .* has 3,670,016 bytes"
        with ThreadPoolExecutor(1) as threads, runner.calls.hold(1):
            failed = threads.submit(store.predict, "large", X).exception(60)
        assert isinstance(failed, BudgetError)
        assert re.search(message, str(failed))
        assert failed.never
        assert list(runner._held) == before
        # Equal tensors are in memory once, so these fit.
        nodes = [
            *(node("MatMul", "x w", "a"), node("MatMul", "x v", "b")),
            *(node("Sin", "a", "c"), node("Add", "b c", "y")),
        ]
        path = save(tmp_path / "ties.onnx", nodes, {"w": two["w"], "v": two["w"]})
        store.add("ties", path)
        np.testing.assert_allclose(store.predict("ties", X), run(path, x=X), rtol=1e-3, atol=1e-4)


def test_weights_that_do_not_fit_are_told(tmp_path: Path) -> None:
    with pydedup.open(tmp_path / "small.db") as store:
        store.add("0", three_stacks(tmp_path)[0])
    message = (
        "0@1 is run by ONNX Runtime, which needs all of its 2,097,408 bytes of weights at once, "
        "'w' (1,048,576 bytes), 'v' (1,048,576 bytes), 'bias' (256 bytes): "
    )
    with (
        pydedup.open(tmp_path / "small.db", memory="2MiB") as store,
        pytest.raises(BudgetError, match=re.escape(message)),
    ):
        store.predict("0", X)
    np.save(tmp_path / "x.npy", X)
    done = run_here("predict", store.url, "0", tmp_path / "x.npy", "--memory", "2MiB")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.endswith("; give more with --memory\n")
