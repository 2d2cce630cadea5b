# SPDX-License-Identifier: Apache-2.0
"""Who goes together, and that nobody's answer depends on it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pydedup
from pydedup.errors import ArgumentError, NotFoundError
from pydedup.graph import Graph, Node
from pydedup.http import served
from pydedup.http.batcher import Batcher
from pydedup.http.problems import HttpError
from pydedup.http.served import ServedStore
from pydedup.http.service import Answer, run_batch
from pydedup.testing.serving import Server, Start


class Work:
    """What a batcher calls: it remembers the batches and waits until it may go on."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, requests: Sequence[int]) -> Iterator[tuple[int, int | Exception]]:
        self.batches.append(list(requests))
        self.go_on.wait(60)
        for number, n in enumerate(requests):
            yield number, NotFoundError("odd") if n < 0 else n * n


def batcher(work: Any, **changes: Any) -> Batcher[int, int]:
    options = {"max_rows": 8, "max_wait": 3600.0, "max_queue": 100, "threads": 2}
    return Batcher(work, observe=lambda requests, rows: None, **{**options, **changes})


async def until(what: Any) -> None:
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.001)


def test_one_alone_does_not_wait() -> None:
    async def main() -> None:
        work = Work()
        one = batcher(work)
        started = time.monotonic()
        assert [await one.submit(n, 1) for n in range(20)] == [n * n for n in range(20)]
        assert time.monotonic() - started < 25  # not 20 x 3600 s
        assert work.batches == [[n] for n in range(20)]
        one.close()

    asyncio.run(main())


def test_those_that_wait_go_together_when_the_first_is_done() -> None:
    async def main() -> None:
        work = Work()
        work.go_on.clear()
        one = batcher(work)
        tasks = [asyncio.create_task(one.submit(n, 1)) for n in range(5)]
        await until(lambda: one.waiting == 4)
        work.go_on.set()
        assert await asyncio.gather(*tasks) == [0, 1, 4, 9, 16]
        assert work.batches == [[0], [1, 2, 3, 4]]
        one.close()

    asyncio.run(main())


def test_enough_rows_go_into_another_thread_at_once() -> None:
    async def main() -> None:
        work = Work()
        work.go_on.clear()
        one = batcher(work)
        tasks = [asyncio.create_task(one.submit(n, 3)) for n in range(6)]
        await until(lambda: len(work.batches) == 2)
        # Three rows each: two fit into eight, and there is no third thread.
        assert work.batches == [[0], [1, 2]]
        assert one.waiting == 3
        work.go_on.set()
        assert await asyncio.gather(*tasks) == [n * n for n in range(6)]
        assert all(len(batch) <= 2 for batch in work.batches)
        one.close()

    asyncio.run(main())


def test_one_row_less_than_enough_waits() -> None:
    async def main() -> None:
        work = Work()
        work.go_on.clear()
        one = batcher(work)
        tasks = [asyncio.create_task(one.submit(0, 1))]
        left = asyncio.create_task(one.submit(9, 7))
        await until(lambda: one.waiting == 1)
        left.cancel()  # its rows are none that wait
        await until(lambda: one.waiting == 0)
        tasks += [asyncio.create_task(one.submit(n, 1)) for n in range(1, 8)]
        await until(lambda: one.waiting == 7)
        tasks.append(asyncio.create_task(one.submit(8, 1)))
        await until(lambda: len(work.batches) == 2)
        assert work.batches == [[0], list(range(1, 9))]
        work.go_on.set()
        assert await asyncio.gather(*tasks) == [n * n for n in range(9)]
        one.close()

    asyncio.run(main())


def test_nobody_waits_longer_than_he_must() -> None:
    async def main() -> None:
        work = Work()
        work.go_on.clear()
        one = batcher(work, max_wait=0.05)
        tasks = [asyncio.create_task(one.submit(n, 1)) for n in range(3)]
        await until(lambda: len(work.batches) == 2)
        assert work.batches == [[0], [1, 2]]
        work.go_on.set()
        assert await asyncio.gather(*tasks) == [0, 1, 4]
        one.close()

    asyncio.run(main())


def test_closing_ends_threads_once_they_are_done() -> None:
    def threads() -> list[str]:
        return [one.name for one in threading.enumerate() if one.name.startswith("predict")]

    async def main() -> None:
        work = Work()
        work.go_on.clear()
        one = batcher(work)
        task = asyncio.create_task(one.submit(3, 1))
        await until(lambda: work.batches)
        one.close()
        assert threads()
        work.go_on.set()
        assert await task == 9
        await until(lambda: not threads())

    asyncio.run(main())


def test_errors_queue_and_those_who_leave() -> None:
    async def main() -> None:
        work = Work()
        work.go_on.clear()
        one = batcher(work, max_queue=3, threads=1)
        first = asyncio.create_task(one.submit(5, 1))
        await until(lambda: work.batches)
        tasks = [asyncio.create_task(one.submit(n, 100)) for n in (1, -1, 3)]
        await until(lambda: one.waiting == 3)
        with pytest.raises(HttpError) as caught:
            await one.submit(7, 1)
        assert caught.value.status == 503
        tasks[0].cancel()
        first.cancel()
        await until(lambda: one.waiting == 2)
        work.go_on.set()
        with pytest.raises(NotFoundError):
            await tasks[1]
        assert await tasks[2] == 9
        assert work.batches == [[5], [-1], [3]]  # more rows than go together: one by one
        assert await one.submit(4, 1) == 16
        one.close()

    asyncio.run(main())


def test_who_is_done_does_not_wait_for_the_rest_of_the_batch() -> None:
    gathered, go_on = threading.Event(), threading.Event()

    def slow_first(requests: Sequence[int]) -> Iterator[tuple[int, int | Exception]]:
        for number in reversed(range(len(requests))):
            if requests[number] < 2:
                (gathered, go_on)[requests[number]].wait(60)
            yield number, requests[number] * 10

    async def main() -> None:
        one = batcher(slow_first, threads=1)
        first = asyncio.create_task(one.submit(0, 1))
        await asyncio.sleep(0)  # it runs alone, and the others gather
        slow, fast = (asyncio.create_task(one.submit(n, 1)) for n in (1, 2))
        await asyncio.sleep(0)
        gathered.set()
        assert await first == 0
        assert await asyncio.wait_for(fast, 30) == 20
        assert not slow.done()
        assert one.running == 1
        go_on.set()
        assert await slow == 10
        one.close()

    asyncio.run(main())


def test_a_fault_after_some_answers_is_told_to_the_others() -> None:
    def half(requests: Sequence[int]) -> Iterator[tuple[int, int | Exception]]:
        yield 0, requests[0]
        if len(requests) > 1:
            raise ZeroDivisionError

    async def main() -> None:
        one = batcher(half, threads=1)
        waiting = [asyncio.create_task(one.submit(n, 1)) for n in range(3)]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert found[:2] == [0, 1]
        assert isinstance(found[2], ZeroDivisionError)
        one.close()

    asyncio.run(main())


def test_a_fault_is_told_to_all_who_waited_for_it() -> None:
    def broken(requests: Sequence[int]) -> Iterator[tuple[int, int | Exception]]:
        raise ZeroDivisionError

    async def main() -> None:
        one = batcher(broken)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await one.submit(1, 1)
        assert one.running == 0
        one.close()

    asyncio.run(main())


# ---- joining ------------------------------------------------------------------------------------


def linear(name: str, source: str, weight: str) -> Node:
    return Node("linear", (source,), name, {"weight": weight})


W = np.random.default_rng(0).standard_normal((4, 4), np.float32)
KERNEL = np.random.default_rng(1).standard_normal((2, 1, 2, 2), np.float32)
#: Graphs and one of their inputs' shapes for a row.
GRAPHS: dict[str, tuple[tuple[Node, ...], tuple[int, ...]]] = {
    "linear": ((linear("y", "x", "w"),), (4,)),
    "linear of a sequence": ((linear("y", "x", "w"),), (3, 4)),
    "softmax of the last": ((Node("softmax", ("x",), "y"),), (4,)),
    "softmax of the first": ((Node("softmax", ("x",), "y", attrs={"axis": 0}),), (4,)),
    "softmax of the first, from the end": (
        (Node("softmax", ("x",), "y", attrs={"axis": -2}),),
        (4,),
    ),
    "mean of rows": ((Node("mean", ("x",), "y", attrs={"axis": 0, "keepdims": True}),), (4,)),
    "mean within rows": ((Node("mean", ("x",), "y", attrs={"axis": [1, 2]}),), (3, 4)),
    "flatten": ((Node("flatten", ("x",), "y"),), (2, 3, 4)),
    "flatten all": ((Node("flatten", ("x",), "y", attrs={"start_axis": 0}),), (4,)),
    "rows that turn": ((Node("transpose", ("x",), "y", attrs={"perm": [1, 0]}),), (4,)),
    "axes that turn": ((Node("transpose", ("x",), "y", attrs={"perm": [0, 2, 1]}),), (3, 4)),
    "reshape within rows": ((Node("reshape", ("x",), "y", attrs={"shape": [-1, 2, 2]}),), (4,)),
    "reshape across rows": ((Node("reshape", ("x",), "y", attrs={"shape": [-1, 2]}),), (4,)),
    "reshape to one row": ((Node("reshape", ("x",), "y", attrs={"shape": [1, -1]}),), (4,)),
    "concat": ((Node("concat", ("x", "x"), "y", attrs={"axis": -1}),), (4,)),
    "concat rows": ((Node("concat", ("x", "x"), "y", attrs={"axis": 0}),), (4,)),
    "sum with itself": ((linear("h", "x", "w"), Node("add", ("x", "h"), "y")), (4,)),
    "sum of unlike ranks": (
        (Node("mean", ("x",), "m", attrs={"axis": 1}), Node("add", ("x", "m"), "y")),
        (4, 4),
    ),
    "images": (
        (
            Node("conv2d", ("x",), "c", {"weight": "k"}),
            Node("max_pool2d", ("c",), "p", attrs={"kernel": [2, 2], "stride": [2, 2]}),
            Node("reshape", ("p",), "y", attrs={"shape": [-1, 18]}),
        ),
        (1, 8, 8),
    ),
    "images and a pool that may go beyond": (
        (
            Node(
                "max_pool2d",
                ("x",),
                "p",
                attrs={"kernel": [2, 2], "stride": [2, 2], "ceil_mode": True},
            ),
            Node("reshape", ("p",), "y", attrs={"shape": [-1, 16]}),
        ),
        (1, 8, 8),
    ),
    "bags by row": ((Node("embedding_bag", ("x",), "y", {"weight": "w"}),), (3,)),
}


@pytest.fixture(scope="module")
def joined_store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    url = f"sqlite:///{tmp_path_factory.mktemp('joined') / 's.db'}"
    with pydedup.open(url) as store:
        for number, (nodes, _) in enumerate(GRAPHS.values()):
            graph = Graph(("x",), ("y",), nodes)
            for version in (1, 2):  # variants, whose work is shared
                tensors = {"w": W * version, "k": KERNEL}
                store.add(f"m{number}@{version}", tensors, graph=graph)
    with ServedStore.connect(url, "64MiB") as found:
        yield found


@settings(max_examples=150)
@given(data=st.data())
def test_answers_do_not_depend_on_company(joined_store: Any, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(list(GRAPHS)), min_size=1, max_size=2))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    requests: list[tuple[str, dict[str, Any]]] = []
    for _ in range(data.draw(st.integers(1, 8))):
        name = data.draw(st.sampled_from(names))
        number = list(GRAPHS).index(name)
        nodes, shape = GRAPHS[name]
        # Some have a number of entries that does not fit, or dtypes of their own.
        rows, slip = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([0] * 6 + [1]))
        x = rng.standard_normal((rows, *shape[:-1], shape[-1] + slip)).astype(
            data.draw(st.sampled_from([np.float32, np.float32, np.float64]))
        )
        if nodes[0].op == "embedding_bag":
            # Some ids are out of range: that fails, and others must not.
            x = rng.integers(0, 4 + data.draw(st.sampled_from([0, 0, 1])), x.shape)
        requests.append((f"m{number}@{data.draw(st.integers(1, 2))}", {"x": x}))
    for (address, inputs), found in zip(requests, answers(joined_store, requests), strict=True):
        try:
            wanted = joined_store.predict(address, inputs)
        except Exception as error:
            assert isinstance(found, Exception), (address, error)  # noqa: PT017
            continue
        assert not isinstance(found, Exception), (address, found)
        assert found.outputs["y"].shape == wanted["y"].shape
        np.testing.assert_allclose(found.outputs["y"], wanted["y"], rtol=1e-4, atol=1e-5)


def answers(store: Any, requests: Sequence[Any]) -> list[Any]:
    """Return what a batch yields, in the order of the requests: an answer, or an exception."""
    found = dict(run_batch(store, [(*request, lambda *nbytes: None) for request in requests]))
    ordered = [found[number] for number in range(len(requests))]
    reasons = [one.outputs if isinstance(one, Answer) else one for one in ordered]
    return [
        reason if isinstance(reason, Exception) else one
        for one, reason in zip(ordered, reasons, strict=True)
    ]


def test_one_that_fails_does_not_disturb_the_others(joined_store: Any) -> None:
    number = list(GRAPHS).index("bags by row")
    ids = [np.array([[0, 1, 2]]), np.array([[0, 9, 2]]), np.array([[3, 3, 3]])]
    found = answers(joined_store, [(f"m{number}@1", {"x": x}) for x in ids])
    assert isinstance(found[1], ArgumentError)
    for x, one in ((ids[0], found[0]), (ids[2], found[2])):
        assert not isinstance(one, Exception)
        np.testing.assert_allclose(one.outputs["y"], W[x[0]].mean(axis=0)[None], rtol=1e-5)


def test_one_that_is_not_admitted_does_not_disturb_the_others(joined_store: Any) -> None:
    def admit(out_nbytes: int, more: int) -> None:
        if (out_nbytes, more) != (16, 0):
            raise HttpError(413, f"{out_nbytes}", "bad_request")

    number = list(GRAPHS).index("bags by row")
    ids = [np.zeros((count, 3), np.int64) for count in (1, 2, 1)]
    requests = [(f"m{number}@1", {"x": x}, admit) for x in ids]
    found = dict(run_batch(joined_store, requests))
    outputs = [found[at].outputs for at in range(3) if isinstance(found[at], Answer)]
    assert isinstance(outputs[1], HttpError)
    assert outputs[1].message == "32"
    for one in (outputs[0], outputs[2]):
        np.testing.assert_allclose(one["y"], W[[0]], rtol=1e-5)


def test_what_does_not_fit_together_is_tried_in_parts(
    joined_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = served.as_predicted
    sizes: list[int] = []

    def poor(ready: list[Any], *more: Any) -> Any:
        sizes.append(len(ready))
        if len(ready) > 2 or any(len(one.inputs["x"]) > 2 for one in ready):
            raise MemoryError
        return together(ready, *more)

    monkeypatch.setattr(served, "as_predicted", poor)
    xs = [np.ones((n, 4), np.float32) for n in (1, 2, 3, 1, 2)]
    found = answers(joined_store, [("m0@1", {"x": x}) for x in xs])
    assert isinstance(found[2], MemoryError)
    assert [len(one.outputs["y"]) for one in found if not isinstance(one, Exception)] == [
        1,
        2,
        1,
        2,
    ]
    assert sizes[0] == 5


def test_an_address_is_resolved_once_per_batch(joined_store: Any) -> None:
    found = answers(joined_store, [("none", {}), ("m0", {"x": np.ones((1, 4))}), ("none", {})])
    assert isinstance(found[0], NotFoundError)
    assert found[0] is found[2]
    assert not isinstance(found[1], Exception)


def test_a_server_joins_what_comes_at_once(start: Start, store_url: str) -> None:
    server = start(store_url, "--threads", 1)
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 512], "data": [0.5] * 512}]}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: server.infer("slow", body), range(64)))
    first = np.array(answers[0].json["outputs"][0]["data"])
    for answer in answers:
        np.testing.assert_allclose(answer.json["outputs"][0]["data"], first, rtol=1e-3, atol=1e-4)
    batches = server.metric("pydedup_batch_requests_count")
    assert server.metric("pydedup_batch_requests_sum") == 64
    assert batches < 48


def test_hundreds_of_connections(server: Server) -> None:
    x = np.random.default_rng(0).standard_normal((1, 4)).tolist()
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": x}]}

    def client(number: int) -> set[int]:
        connection = server.connect()
        path = "/v2/models/dense/infer" if number % 3 else "/v2/models/none/infer"
        try:
            return {server.ask("POST", path, body, connection=connection).status for _ in range(5)}
        finally:
            connection.close()

    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(client, range(200)))
    assert all(statuses == ({200} if n % 3 else {404}) for n, statuses in enumerate(found))
