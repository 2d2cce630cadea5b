# SPDX-License-Identifier: Apache-2.0
"""Several clients of one store at once, on each back end.

Processes that add different models at the same moment store no block twice and lose none; readers
go on during adds, removals and vacuums, and what they read is one version, never a mix of two.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup import policies, registry
from pydedup.adapter import STAGING
from pydedup.adapter_options import StagingAdapter
from pydedup.errors import ArgumentError, ConflictError, NotFoundError
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


_CHURN = """
import sys, time
import numpy as np
import pydedup

url, me, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
rng = np.random.default_rng(int(me))
kept = np.random.default_rng(9).standard_normal((128, 256)).astype(np.float32)
end, count = time.monotonic() + seconds, 0
with pydedup.open(url) as store:
    while time.monotonic() < end or count < 5:
        mine = kept.copy()
        mine[rng.choice(128, 8)] += 0.1
        store.add(f"w{me}_{count}", {"w": mine})
        store.remove(f"w{me}_{count}")
        count += 1
print(count)
"""


def test_adds_go_on_while_others_remove_models(store_url: str) -> None:
    """What an add compares with may be removed by somebody else at any moment."""
    kept = np.random.default_rng(9).standard_normal((128, 256)).astype(np.float32)
    with pydedup.open(store_url) as store:
        store.add("keep", {"w": kept})
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _CHURN, store_url, str(me), "1.5"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert int(out) >= 5
    with pydedup.open(store_url) as store:
        assert [info.address for info in store.models()] == ["keep@1"]
        assert np.array_equal(store.load("keep")["w"], kept)
        assert store.verify().ok


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


def test_a_vacuum_takes_no_add_that_publishes_meanwhile(store_url: str) -> None:
    """Between what a vacuum reads, an add that was staged before gets to its end, or tries to."""
    staged, go = threading.Event(), threading.Event()
    model = version(2)

    def wait(stage: str, done: int, total: int) -> None:
        if stage == "writing" and not staged.is_set():
            staged.set()
            assert go.wait(30)

    failures: list[BaseException] = []

    def add() -> None:
        try:
            with pydedup.open(store_url) as store:
                store.add("new@1", model, policy=policies.Exact(), progress=wait)
        except BaseException as error:  # shown below
            failures.append(error)

    with pydedup.open(store_url) as store:
        store.add("kept@1", version(1), policy=policies.Exact())
    adder = threading.Thread(target=add)
    adder.start()
    assert staged.wait(30)

    def meanwhile() -> None:
        go.set()
        adder.join(0.3)  # it may have to wait for the vacuum

    adapter, _ = inject(registry.connect(store_url, mode="a"), Fault("jobs", meanwhile))
    with Store(adapter, 64 << 20) as store:
        store.vacuum()
        adder.join(60)
        assert not failures, failures
        assert same(store.load("new"), model)
        store.vacuum()
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])


def test_an_alias_never_points_at_what_is_removed_meanwhile(store_url: str) -> None:
    with pydedup.open(store_url) as store:
        for number in (1, 2):
            store.add(f"m@{number}", version(number), policy=policies.Exact())
    told: list[Exception] = []

    def remove() -> None:
        try:
            with pydedup.open(store_url) as store:
                store.remove("m@1")
        except ArgumentError as error:
            told.append(error)

    remover = threading.Thread(target=remove)

    def meanwhile() -> None:
        remover.start()
        remover.join(0.3)  # it may have to wait

    adapter, _ = inject(registry.connect(store_url, mode="a"), Fault("set_alias", meanwhile))
    with Store(adapter, 64 << 20) as store:
        store.alias("m", "prod", "1")
        remover.join(60)
        assert "alias 'prod' points at m@1" in str(told[0])
        assert same(store.load("m@prod"), version(1))
        assert store.verify().errors == []


def test_a_model_that_is_removed_before_its_layers_are_read_is_told_as_removed(
    store_url: str,
) -> None:
    """It was said to have no graph."""
    x = np.ones((1, 3), np.float32)
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    with pydedup.open(store_url) as store:
        store.add("m", {"w": x}, graph=graph)

    def remove() -> None:
        with pydedup.open(store_url) as store:
            store.remove("m@1")

    adapter, _ = inject(registry.connect(store_url, mode="r"), Fault("artifact", remove))
    with (
        Store(adapter, 64 << 20) as store,
        pytest.raises(NotFoundError, match="m@1 was removed from the store"),
    ):
        store.predict("m", x)


def test_a_vacuum_leaves_pages_that_an_add_has_staged(store_url: str, small_pages: None) -> None:
    """While they are written no model is recorded as reading them."""
    model = {"w": np.random.default_rng(0).standard_normal((768, 1024))}
    unread: list[int] = []

    def vacuum() -> None:
        with pydedup.open(store_url) as store:
            staged = {row.id for row in store._adapter.page_rows(state=STAGING)}
            unread.append(len(staged.intersection(store._adapter.orphan_pages())))
            store.vacuum()

    with pydedup.open(store_url):
        pass
    adapter, control = inject(registry.connect(store_url, mode="a"))
    scope = "staging" if isinstance(adapter, StagingAdapter) else "transaction"
    with Store(adapter, 64 << 20) as store:
        for call in (2, 3, 4):  # between two transactions
            control.add_fault(Fault(scope, vacuum, call=control.calls[scope] + call))
        store.add("m", model, workers=1)
        assert max(unread) > 0
        assert np.array_equal(store.load("m")["w"], model["w"])
        assert store.verify().errors == []


def test_what_an_add_shares_is_removed_before_it_is_staged(store_url: str) -> None:
    """By a removal alone, without a vacuum: the pages are nobody's from then on."""
    shared, own = np.random.default_rng(0).standard_normal((2, 128, 128))
    with pydedup.open(store_url) as store:
        store.add("m", {"w": shared})

    def remove() -> None:
        with pydedup.open(store_url) as store:
            store.remove("m")

    adapter, control = inject(registry.connect(store_url, mode="a"))
    scope = "staging" if isinstance(adapter, StagingAdapter) else "transaction"
    control.add_fault(Fault(scope, remove))
    with Store(adapter, 64 << 20) as store:
        store.add("n", {"w": shared, "own": own})
        assert [info.name for info in store.models()] == ["n"]
        assert store.verify().errors == []
        store.vacuum()
        assert np.array_equal(store.load("n")["w"], shared)
        assert np.array_equal(store.load("n")["own"], own)


def test_bases_of_what_an_add_shares_are_removed_before_it_is_staged(store_url: str) -> None:
    """The deltas are still there, on a page that another model reads; their bases are nobody's."""
    base, own = np.random.default_rng(0).standard_normal((2, 128, 128)).astype(np.float32)
    near = base * np.float32(1 + 1e-6)
    with pydedup.open(store_url) as store:
        store.add("base", {"w": base})
        added = store.add_many({"mixed": {"w": near, "own": own}, "other": {"own": own}})
        assert added[0].delta_blocks > 0

    def remove() -> None:
        with pydedup.open(store_url) as store:
            store.remove("mixed")
            store.remove("base")
            assert any("a delta whose base is gone" in note for note in store.verify().notes)

    adapter, control = inject(registry.connect(store_url, mode="a"))
    scope = "staging" if isinstance(adapter, StagingAdapter) else "transaction"
    control.add_fault(Fault(scope, remove))
    with Store(adapter, 64 << 20) as store:
        store.add("n", {"w": near})
        assert [info.name for info in store.models()] == ["n", "other"]
        assert store.verify().errors == []
        store.vacuum()
        assert np.array_equal(store.load("n")["w"], near)


def test_a_vacuum_gives_way_to_who_publishes_before_its_layout(store_url: str) -> None:
    """Pages that came meanwhile are not of its layout, and would go with the old ones."""
    a, b, c = np.random.default_rng(0).standard_normal((3, 128, 128))
    with pydedup.open(store_url) as store:
        store.add_many({"gone": {"a": a, "b": b}, "kept": {"a": a}}, policy=policies.Exact())
        store.remove("gone")

    def add() -> None:
        with pydedup.open(store_url) as store:
            store.add("new", {"c": c}, policy=policies.Exact())

    adapter, control = inject(registry.connect(store_url, mode="a"))
    # What is staged is so in its first transaction of that kind, elsewhere in the second of all.
    scope, call = ("staging", 1) if isinstance(adapter, StagingAdapter) else ("transaction", 2)
    control.add_fault(Fault(scope, add, call=call, after=True))
    with Store(adapter, 64 << 20) as store:
        for is_alone in (False, True):
            assert (store.vacuum().rewritten_pages > 0) == is_alone
            assert np.array_equal(store.load("kept")["a"], a)
            assert np.array_equal(store.load("new")["c"], c)
            assert store.verify().errors == []


def test_a_vacuum_leaves_the_index_of_what_is_added_meanwhile(store_url: str) -> None:
    """The pages were looked at before, so all that it had indexed was on none of them."""
    arrays = np.random.default_rng(0).standard_normal((2, 64, 64))
    with pydedup.open(store_url) as store:
        store.add("m@1", {"w": arrays[0]})

    def add() -> None:
        with pydedup.open(store_url) as store:
            store.add("m@2", {"w": arrays[1]})

    adapter, _ = inject(registry.connect(store_url, mode="a"), Fault("signatures", add))
    with Store(adapter, 64 << 20) as store:
        store.vacuum()
        covered = np.concatenate([segment.page_ids for segment in read_segments(adapter)])
        assert set(covered.tolist()) == {row.id for row in adapter.page_rows()}


def test_a_model_that_is_removed_meanwhile_is_not_exported_without_its_files(
    store_url: str, tmp_path: Path
) -> None:
    """What it had beside its tensors was left out."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": np.ones((3, 3), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    with pydedup.open(store_url) as store:
        store.add("m", folder)

    def remove() -> None:
        with pydedup.open(store_url) as store:
            store.remove("m@1")

    adapter, _ = inject(registry.connect(store_url, mode="r"), Fault("artifacts", remove))
    with Store(adapter, 64 << 20) as store:
        store.load("m")  # so that no page has to be read
        with pytest.raises(NotFoundError, match="m@1 was removed from the store"):
            store.export("m", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


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
