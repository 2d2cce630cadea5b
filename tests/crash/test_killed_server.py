# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of a server, with all of its processes, while clients add and while they serve.

Nothing that was committed is lost, an add is there whole or not at all, and serving goes on by
itself, with right answers: nobody who reads pauses for 5 seconds after the server's return.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import policies, registry
from pydedup.adapter import STAGING
from pydedup.errors import DuplicateError, UnavailableError
from pydedup.graph import Graph, Node
from pydedup.store import Store
from pydedup.testing._contract_base import add_random_pages, open_store
from pydedup.testing.crash import PHASES, at
from pydedup.testing.faults import inject
from pydedup.testing.serving import until

#: Within so many seconds of a server's return serving goes on, beside what the machine takes to
#: answer, which is not ours.
BACK_SECONDS = 5.0

Model = dict[str, np.ndarray]


def network(seed: int) -> Model:
    rng = np.random.default_rng(seed)
    return {
        "0.weight": rng.standard_normal((1024, 512)).astype(np.float32),
        "2.weight": rng.standard_normal((300, 1024)).astype(np.float32),
    }


GRAPH = Graph(
    ("x",),
    ("y",),
    (
        Node("linear", ("x",), "h", {"weight": "0.weight"}),
        Node("relu", ("h",), "r"),
        Node("linear", ("r",), "y", {"weight": "2.weight"}),
    ),
)


def answer(model: Model, x: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(x @ model["0.weight"].T, 0) @ model["2.weight"].T)


def same(found: Model, model: Model) -> bool:
    return found.keys() == model.keys() and all(
        found[name].tobytes() == array.tobytes() for name, array in model.items()
    )


@pytest.mark.parametrize("name", PHASES["add"])
def test_a_server_that_is_killed_during_an_add(
    own_server: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pydedup.ingest.pages.PAGES_PER_TRANSACTION", 1)
    url = own_server.new_place()
    phase = PHASES["add"][name]
    kept, new = network(1), network(2)
    with pydedup.open(url) as store:
        store.add("kept@1", kept, policy=policies.Exact())
    delay = random.Random(name).random() * 0.003
    killer = threading.Timer(delay, own_server.kill)
    struck = threading.Event()

    def strike() -> None:
        struck.set()
        if name == "in the commit":
            killer.start()
        else:
            own_server.kill()
            own_server.start()

    adapter, control = inject(registry.connect(url, mode="a"))
    at(control, phase, strike)
    with Store(adapter, 64 << 20) as store:
        try:
            store.add("new@1", new, policy=policies.Exact())
            told = True
        except UnavailableError:
            told = False
    assert struck.is_set()
    if name == "in the commit":
        killer.join()
        own_server.start()
    with pydedup.open(url) as store:
        published = {info.address for info in store.models()} == {"kept@1", "new@1"}
        if told or phase.moment != "in the commit":
            assert published == told
        assert store.verify().errors == []
        assert same(store.load("kept"), kept)
        with contextlib.suppress(DuplicateError):
            store.add("new@1", new, policy=policies.Exact())
        assert same(store.load("new@1"), new)
        store.vacuum(lease_seconds=0)  # this process, whose add it was, is still there
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
    adapter = registry.connect(url, mode="r")
    assert (adapter.jobs(), adapter.models(state=STAGING)) == ([], [])
    adapter.close()


@contextlib.contextmanager
def in_threads(*uses: Callable[[], object]) -> Iterator[list[float]]:
    """Do each over and over; give the times of their last successes; nothing may be raised."""
    done = threading.Event()
    succeeded = [0.0] * len(uses)
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            while not done.is_set():
                uses[number]()
                succeeded[number] = time.monotonic()
        except BaseException as error:  # shown below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(uses))]
    for thread in threads:
        thread.start()
    try:
        yield succeeded
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert not failures, failures


#: A pause before something is read again: whose, from when to when.
Pauses = list[tuple[int, float, float]]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    """Note all pauses.

    A server is waited for as long as a machine that has much else to do takes to start it.
    """
    taken: Pauses = []

    def sleep(seconds: float) -> None:
        now = time.monotonic()
        taken.append((threading.get_ident(), now, now + seconds))
        time.sleep(seconds)

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr("pydedup.adapters._again.time", clock)
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 200.0)
    return taken


def kill_and_return(server: Any, succeeded: list[float], pauses: Pauses) -> None:
    """Kill a server that is read from, start it again, and wait until all goes on."""
    begun = time.monotonic()
    until(lambda: min(succeeded) > begun)
    server.kill()
    until(lambda: sum(end - start for _, start, end in pauses if start > begun) > 2)
    server.start()
    back = time.monotonic()
    until(lambda: min(succeeded) > back)
    paused: Counter[int] = Counter()
    for thread, start, end in pauses:
        paused[thread] += max(0.0, end - max(start, back))
    assert max(paused.values()) < BACK_SECONDS


def test_serving_goes_on_when_a_killed_server_is_back(own_server: Any, pauses: Pauses) -> None:
    url = own_server.new_place()
    models = {f"m{seed}@1": network(seed) for seed in range(2)}
    with pydedup.open(url) as store:
        for address, model in models.items():
            store.add(address, model, graph=GRAPH, policy=policies.Exact())
    x = np.random.default_rng(9).standard_normal((3, 512)).astype(np.float32)

    # Two pages fit into memory, so every answer is read from the server anew.
    with pydedup.open(url, mode="r", memory="2MiB") as store:

        def serve() -> None:
            for address, model in models.items():
                expected = answer(model, x)
                np.testing.assert_allclose(store.predict(address, x), expected, 1e-4, 1e-2)

        def load() -> None:
            assert same(store.load("m0"), models["m0@1"])

        with in_threads(serve, load) as succeeded:
            for _ in range(2):
                kill_and_return(own_server, succeeded, pauses)
        assert store.verify().ok


def test_what_was_committed_is_read_and_all_else_is_not(own_server: Any, pauses: Pauses) -> None:
    adapter = open_store(own_server.new_place())
    pages = add_random_pages(adapter, 20)

    def delete() -> None:
        adapter.delete_pages(list(pages))
        own_server.kill()
        own_server.start()
        adapter.bump_epoch()

    with pytest.raises(UnavailableError), adapter.transaction():
        delete()

    def read() -> None:
        assert dict(adapter.read_pages(list(pages))) == pages

    def look() -> None:
        # Within a snapshot nothing is read again: it might be of another state.
        with contextlib.suppress(UnavailableError), adapter.snapshot():
            assert [row.id for row in adapter.page_rows()] == list(pages)

    with in_threads(read, look, adapter.epoch) as succeeded:
        kill_and_return(own_server, succeeded, pauses)
    assert adapter.epoch() == 0
    with adapter.transaction():
        assert adapter.bump_epoch(0)
    assert adapter.integrity_errors() == []
    adapter.close()


def test_a_server_that_stays_away(own_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.3)
    adapter = open_store(own_server.new_place())
    own_server.kill()
    try:
        uses: list[Callable[[], object]] = [adapter.epoch, lambda: list(adapter.read_pages([1]))]
        for use in (*uses, lambda: add_random_pages(adapter, 1)):
            with pytest.raises(UnavailableError, match="check that the server runs"):
                use()
    finally:
        own_server.start()
    assert adapter.epoch() == 0
    adapter.close()


def test_a_server_that_came_back_is_found_by_who_does_not_wait_for_it(
    own_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another thread had waited in vain, who had a connection of before failed at once."""
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.3)
    monkeypatch.setattr("pydedup.adapters._again.IN_VAIN_SECONDS", 1e6)
    adapter = open_store(own_server.new_place())
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        assert [one.submit(adapter.epoch).result() for one in (reader, writer)] == [0, 0]
        own_server.kill()
        try:
            with pytest.raises(UnavailableError, match="check that the server runs"):
                adapter.epoch()
        finally:
            own_server.start()
        assert reader.submit(adapter.epoch).result() == 0
        assert writer.submit(add_random_pages, adapter, 1).result().keys() == {1}
    adapter.close()


def test_an_operation_waits_once_for_a_server_that_stays_away(
    own_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What began on MySQL waited three times, and a vacuum as it tidied up and went on."""
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds)
    )
    old, new = network(1), network(1)
    new["0.weight"][::2] = 0  # half of each page is nobody's once the old one is removed
    with pydedup.open(own_server.new_place()) as store:
        for address, model in {"m@old": old, "m@new": new}.items():
            store.add(address, model, policy=policies.Exact(), block_shape=(1, 512))
        store.remove("m@old")
        monkeypatch.setattr("pydedup.adapters._again.time", clock)
        gone = []

        def kill(*_: object) -> None:
            if not gone:
                own_server.kill()
                gone.append(True)

        uses = [lambda: store.vacuum(progress=kill), store.stats, lambda: store.remove("m@new")]
        try:
            for use in uses:
                now[0] += 60
                begun = now[0]
                with pytest.raises(UnavailableError, match="check that the server runs"):
                    use()
                assert gone
                assert 5 < now[0] - begun <= 10
        finally:
            own_server.start()
        assert same(store.load("m@new"), new)


def test_who_is_interrupted_as_he_waits_for_a_server_does_not_wait_anew(
    own_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C took ten seconds more, for which the server was waited for to tidy up there."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            raise KeyboardInterrupt

    clock = SimpleNamespace(monotonic=lambda: 60 + sum(slept), sleep=sleep)
    old, new = network(1), network(1)
    new["0.weight"][::2] = 0
    with pydedup.open(own_server.new_place()) as store:
        for address, model in {"m@old": old, "m@new": new}.items():
            store.add(address, model, policy=policies.Exact(), block_shape=(1, 512))
        store.remove("m@old")
        monkeypatch.setattr("pydedup.adapters._again.time", clock)
        killed: list[object] = []

        def kill(*told: object) -> None:
            if not killed:
                own_server.kill()
                killed.append(told)

        try:
            with pytest.raises(KeyboardInterrupt):
                store.vacuum(progress=kill)
        finally:
            own_server.start()
        assert len(slept) == 1
        assert same(store.load("m@new"), new)
