# SPDX-License-Identifier: Apache-2.0
"""Several clients of one store that add and read at once, on each back end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import policies, registry
from pydedup.adapter_options import StagingAdapter
from pydedup.errors import (
    ArgumentError,
    ConflictError,
    DuplicateError,
    NotFoundError,
    StoreError,
)
from pydedup.graph import Graph, Node
from pydedup.signatures import read_segments
from pydedup.store import Store
from pydedup.testing.faults import Fault, inject
from pydedup.types import AddReport

Model = dict[str, np.ndarray]

MEMBER = """
import numpy as np


def member(number):
    # One of a family: half of its rows are everybody's, half its own.
    rows = np.random.default_rng(1).standard_normal((6000, 64)).astype(np.float32)
    rows[3000:] = np.random.default_rng(100 + number).standard_normal((3000, 64))
    return {"w": rows}
"""

ADD = f"""{MEMBER}
import sys
import pydedup
from pydedup import policies

url, number = sys.argv[1], int(sys.argv[2])
mine = [member(10 * number + i) for i in range(3)]
with pydedup.open(url) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    for version, model in enumerate(mine):
        store.add(f"m{{number}}@{{version}}", model, policy=policies.Exact())
"""


def same(found: Model, model: Model) -> bool:
    return found.keys() == model.keys() and all(
        found[name].tobytes() == array.tobytes() for name, array in model.items()
    )


def stored_blocks(url: str) -> tuple[int, int]:
    """Return how many blocks are on live pages, and how many of them differ."""
    adapter = registry.connect(url, mode="r")
    live = [row.id for row in adapter.page_rows(state="live")]
    hashes = [block.hash128 for block in adapter.blocks_on_pages(live)]
    adapter.close()
    return len(hashes), len(set(hashes))


def test_processes_that_add_at_once_store_no_block_twice(store_url: str) -> None:
    names: dict[str, object] = {}
    exec(MEMBER, names)
    member = names["member"]
    assert callable(member)
    pydedup.open(store_url).close()
    workers = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", ADD, store_url, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:  # all of them are about to begin
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    with pydedup.open(store_url) as store:
        while any(worker.poll() is None for worker in workers):
            store.vacuum()  # must not take what is being added
            for info in store.models():
                expected = member(10 * int(info.name[1:]) + int(info.version))
                assert same(store.load(info.address), expected)
        for worker in workers:
            worker.communicate()
        assert [worker.returncode for worker in workers] == [0, 0, 0]
        assert len(store.models()) == 9
        for number in range(3):
            for version in range(3):
                model = store.load(f"m{number}@{version}")
                assert same(model, member(10 * number + version))
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
    blocks, different = stored_blocks(store_url)
    assert blocks == different, "a block was stored twice"
    own, shared = 9 * 3000 * 64 * 4, 3000 * 64 * 4
    assert blocks * 16 * 1024 >= 0.9 * (own + shared), "these are all of them"


@pytest.mark.parametrize("policy", [policies.Lossless(), policies.Bounded(1e-5)], ids=str)
@pytest.mark.parametrize("base_is_there", [True, False])
def test_deltas_that_another_writer_published_are_not_stored_twice(
    store_url: str, policy: policies.Policy, base_is_there: bool
) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((512, 256)).astype(np.float32)
    tuned = base * (1 + 1e-4 * rng.standard_normal(base.shape)).astype(np.float32)
    model = {"base": base, "tuned": tuned}
    faster: list[AddReport] = []
    with pydedup.open(store_url) as store, pydedup.open(store_url) as other:
        if base_is_there:
            store.add("base", {"base": base})

        def be_faster(stage: str, done: int, total: int) -> None:
            if stage == "writing" and not faster:
                faster.append(other.add("faster", model, policy=policy))

        mine = store.add("mine", model, policy=policy, progress=be_faster)
        assert faster[0].delta_blocks == mine.delta_blocks == 32
        assert (mine.stored_bytes, mine.shared_blocks) == (0, mine.blocks)
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        assert store.info("mine").used_bytes == store.explain("mine").used_bytes
        assert same(store.load("mine"), other.load("faster"))
        store.remove("faster")
        store.vacuum()
        assert store.verify().ok
        if policy.max_rel_error == 0:
            assert same(store.load("mine"), model)


def test_a_base_that_another_writer_published_as_a_delta_stays_a_base(store_url: str) -> None:
    """A base is never itself a delta, also when the same block is one elsewhere."""
    rng = np.random.default_rng(1)
    root = rng.standard_normal((512, 256)).astype(np.float32)
    base, tuned = (
        root * (1 + far * rng.standard_normal(root.shape)).astype(np.float32)
        for far in (1e-4, 2e-4)
    )
    faster: list[AddReport] = []
    with pydedup.open(store_url) as store, pydedup.open(store_url) as other:

        def be_faster(stage: str, done: int, total: int) -> None:
            if stage == "writing" and not faster:
                faster.extend(other.add(name, {"w": w}) for name, w in [("a", root), ("b", base)])

        model = {"base": base, "tuned": tuned}
        mine = store.add("mine", model, progress=be_faster)
        assert faster[1].delta_blocks == mine.delta_blocks == 32
        assert mine.shared_blocks == 0
        assert store.verify().errors == []
        for name in ("a", "b"):
            store.remove(name)
        store.vacuum()
        assert store.verify().errors == []
        assert same(store.load("mine"), model)


def test_a_base_that_another_writer_published_is_not_stored_twice(store_url: str) -> None:
    rng = np.random.default_rng(1)
    base = rng.standard_normal((512, 256)).astype(np.float32)
    tuned = base * (1 + 1e-4 * rng.standard_normal(base.shape)).astype(np.float32)
    faster: list[AddReport] = []
    with pydedup.open(store_url) as store, pydedup.open(store_url) as other:

        def be_faster(stage: str, done: int, total: int) -> None:
            if stage == "writing" and not faster:
                faster.append(other.add("theirs", {"w": base}))

        model = {"base": base, "tuned": tuned}
        mine = store.add("mine", model, progress=be_faster)
        assert (mine.delta_blocks, mine.shared_blocks) == (32, 32)
        assert store.stats().distinct_blocks == 64
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        store.remove("theirs")
        store.vacuum()
        assert store.verify().errors == []
        assert same(store.load("mine"), model)


def test_the_same_bytes_that_another_writer_published_as_another_dtype(store_url: str) -> None:
    """Their hash is the same, and so is that of what is not to be shared."""
    floats = np.random.default_rng(1).standard_normal((128, 256)).astype(np.float32)
    faster: list[AddReport] = []
    with pydedup.open(store_url) as store, pydedup.open(store_url) as other:

        def be_faster(stage: str, done: int, total: int) -> None:
            if stage == "writing" and not faster:
                faster.append(other.add("theirs", {"w": floats.view(np.int32)}))

        assert store.add("mine", {"w": floats}, progress=be_faster).shared_blocks == 0
        assert len(faster) == 1
        assert store.verify().errors == []
        assert same(store.load("mine"), {"w": floats})
        assert same(store.load("theirs"), {"w": floats.view(np.int32)})


GRAPH = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "weight", "bias": "bias"}),))


def version(number: int) -> Model:
    """Of version n each row of weights is n times that of version 1, and the bias is n."""
    weight = np.ones((3000, 64), np.float32) * np.arange(1, 3001, dtype=np.float32)[:, None]
    return {"weight": weight * number, "bias": np.full(3000, number, np.float32)}


def of_one_version(found: Model) -> float:
    """Return the version that tensors are of, all of them in each of their blocks."""
    number = float(found["bias"][0])
    assert same(found, version(int(number))), "a mix of versions was read"
    return number


def of_one_answer(y: np.ndarray) -> float:
    """Return the version that an answer to a row of ones is of."""
    number = float(y[0, 0] / (64 + 1))
    assert np.array_equal(y[0], number * (64 * np.arange(1, 3001) + 1)), "a mix of versions"
    return number


def test_readers_see_one_version_while_writers_change_it(store_url: str) -> None:
    rounds, ones = 8, np.ones((1, 64), np.float32)
    with pydedup.open(store_url) as store:
        store.add("m@1", version(1), graph=GRAPH, policy=policies.Exact())
    done = threading.Event()
    seen: list[list[float]] = [[], [], []]
    failures: list[BaseException] = []

    def read(number: int) -> None:
        try:
            # So little memory that a model does not fit: it is read again and again.
            with pydedup.open(store_url, mode="r", memory="2MiB") as reader:
                while not done.is_set():
                    if number == 0:
                        seen[0].append(of_one_version(reader.load("m")))
                    elif number == 1:
                        seen[1].append(of_one_answer(reader.predict("m", ones)))
                    else:
                        time.sleep(0.001)
                        tensor = reader.tensor("m", "weight").take(np.array([0, 2999]))
                        assert tensor[1, 0] == 3000 * tensor[0, 0], "a mix of versions was read"
                        seen[2].append(float(tensor[0, 0]))
        except BaseException as error:  # shown below
            failures.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    with pydedup.open(store_url) as store:
        for number in range(2, rounds + 1):
            store.add(f"m@{number}", version(number), graph=GRAPH, policy=policies.Exact())
            if number > 3:
                store.remove(f"m@{number - 3}")
            store.vacuum()
            latest = time.monotonic() + 30
            while not all(numbers and numbers[-1] == number for numbers in seen) and not failures:
                assert time.monotonic() < latest, "a reader does not see what was published"
                time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    for numbers in seen:
        assert numbers == sorted(numbers), "a reader went back to an older version"
        assert set(numbers) <= set(range(1, rounds + 1))


@pytest.mark.parametrize("first", ["add", "remove", "vacuum"])
def test_a_writer_that_waits_too_long_changes_nothing(store_url: str, first: str) -> None:
    """Another client holds the epoch: what would publish waits as long as the URL says."""
    model = version(1)
    with pydedup.open(store_url) as store:
        store.add_many({"kept@1": model, "old@1": version(2)}, policy=policies.Exact())
    timeout = f"{store_url}{'&' if '?' in store_url else '?'}timeout=0.2"
    holder = registry.connect(store_url, mode="a")
    with pydedup.open(timeout) as store:
        work = {
            "add": lambda: store.add("new@1", version(3), policy=policies.Exact()),
            "remove": lambda: store.remove("old@1"),
            "vacuum": store.vacuum,
        }[first]
        with holder.transaction():
            holder.bump_epoch()
            with pytest.raises(ConflictError, match="timeout="):
                work()
            assert same(store.load("kept"), model), "reading waits for nobody"
        assert [info.address for info in store.models()] == ["kept@1", "old@1"]
        assert store.verify().errors == []
        work()  # and now it may
        store.vacuum(lease_seconds=0)
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
    holder.close()


def test_another_writer_is_waited_for_once(tmp_path: Path) -> None:
    """An add that SQLite did not let begin waited as long again, to take back nothing."""
    adapter, control = inject(registry.connect(f"sqlite:///{tmp_path / 'store.db'}", mode="a"))
    adapter.create_schema({})
    with Store(adapter, 64 << 20) as store:
        control.add_fault(Fault("staging", ConflictError("busy"), call=0))
        with pytest.raises(ConflictError, match="busy"):
            store.add("late", {"w": np.ones((3, 3))})
        calls = [control.calls[scope] for scope in ("staging", "publishing", "transaction")]
        assert calls == [1, 0, 0]


def test_who_is_overtaken_when_it_is_staged_takes_the_next_number(store_url: str) -> None:
    first, second = np.random.default_rng(0).standard_normal((2, 64, 64))

    def overtake() -> None:
        with pydedup.open(store_url) as other:
            assert other.add("m", {"w": second}).model == "m@1"

    pydedup.open(store_url).close()
    adapter, control = inject(registry.connect(store_url, mode="a"))
    scope = "staging" if isinstance(adapter, StagingAdapter) else "transaction"
    with Store(adapter, 64 << 20) as store:
        control.add_fault(Fault(scope, overtake, after=True))
        assert store.add("m", {"w": first}).model == "m@2"
        assert np.array_equal(store.load("m@1")["w"], second)
        assert np.array_equal(store.load("m@2")["w"], first)
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])


def test_a_version_that_becomes_an_alias_meanwhile_is_not_published(store_url: str) -> None:
    """The alias would have meant the new version from then on."""
    first, second = np.random.default_rng(0).standard_normal((2, 64, 64))
    with pydedup.open(store_url) as store, pydedup.open(store_url) as other:
        store.add("m@1", {"w": first})
        store.alias("m", "2", "1")
        with pytest.raises(ArgumentError, match="'2' is an alias of m"):
            store.add("m@2", {"w": second})
        assert store.add("m", {"w": second}).model == "m@3", "the next number that is free"

        def overtake(alias: str) -> Callable[[str, int, int], None]:
            def point(stage: str, done: int, total: int) -> None:
                if stage == "writing":
                    other.alias("m", alias, "1")

            return point

        with pytest.raises(DuplicateError, match="has an alias m@stable since a moment ago"):
            store.add("m@stable", {"w": second + 1}, progress=overtake("stable"))
        assert store.add("m", {"w": second + 1}, progress=overtake("4")).model == "m@5"
        for alias in ("2", "4", "stable"):
            assert np.array_equal(other.load(f"m@{alias}")["w"], first)
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])


def test_an_add_that_fails_late_leaves_nothing_in_the_index(store_url: str) -> None:
    """Later adds would read it each time."""
    model = {"w": np.random.default_rng(0).standard_normal((64, 64))}
    pydedup.open(store_url).close()
    adapter, control = inject(registry.connect(store_url, mode="a"))
    with Store(adapter, 64 << 20) as store:
        control.add_fault(Fault("update_model", StoreError("no room")))
        with pytest.raises(StoreError, match="no room"):
            store.add("m", model)
        assert read_segments(adapter) == []
        store.add("m", model)
        assert len(read_segments(adapter)) == 1


def test_pages_of_a_transaction_that_failed_are_not_deleted(tmp_path: Path) -> None:
    """By then their ids may be those of what another writer stages."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    pydedup.open(url).close()
    deletes: list[None] = []
    adapter, _ = inject(
        registry.connect(url, mode="a"),
        Fault("put_job", ConflictError("another writer"), 1),  # the last of what is staged first
        Fault("delete_pages", lambda: deletes.append(None), 0),
    )
    with Store(adapter, 1 << 26) as store:
        with pytest.raises(ConflictError, match="another writer"):
            store.add("m", {"w": np.ones((64, 64), np.float32)})
        assert not deletes
        store.add("m", {"w": np.ones((64, 64), np.float32)})
        assert store.verify().errors == []


@pytest.mark.parametrize("called", ["2", "stable"])
def test_a_version_that_is_published_while_it_is_looked_for_is_found(
    store_url: str, called: str
) -> None:
    model = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    with pydedup.open(store_url) as other:
        other.add("m@1", model)
        adapter, control = inject(registry.connect(store_url, mode="r"))

        def publish() -> None:
            other.add("m@2", {"w": model["w"] + 1})
            other.alias("m", "stable", "2")

        control.add_fault(Fault("model_called", publish, after=True))
        with Store(adapter, 64 << 20) as store:
            assert np.array_equal(store.load(f"m@{called}")["w"], model["w"] + 1)
            with pytest.raises(NotFoundError, match="it has"):
                store.load("m@3")
