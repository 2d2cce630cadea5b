# SPDX-License-Identifier: Apache-2.0
"""However many workers help to add models, the store is the same: every row of every table.

The models are drawn: families of near copies, parts that are identical, tied weights, tensors of
all sizes and several dtypes, as files and as arrays.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup import config, jobs, registry
from pydedup.adapters._schema import TABLES
from pydedup.errors import ArgumentError, FormatError, StorageFullError
from pydedup.ingest import ahead, tensors, workers
from pydedup.policies import Accuracy, Bounded, Exact, Lossless, Policy
from pydedup.testing.faults import Fault, inject
from pydedup.types import DType

Model = dict[str, np.ndarray]


def target(arrays: Mapping[str, np.ndarray]) -> float:
    """A metric that falls as weights move."""
    return -float(sum(np.abs(a.astype(np.float64)).sum() for a in arrays.values())) / 1e6


POLICIES: dict[str, Policy] = {
    "exact": Exact(),
    "lossless": Lossless(),
    "bounded": Bounded(0.002),
    "accuracy": Accuracy(target, 0.05, search="halving", max_evaluations=12),
}


def family(seed: int, models: int = 4) -> dict[str, Model]:
    """Models of which each took some tensors from one before, moved some, and made some anew."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embedding": (700, 96),
        "wide": (96, 2048),
        "square": (512, 512),
        "conv": (64, 32, 3, 3),
        "bias": (300,),
        "scalar": (),
        "empty": (0, 8),
    }
    dtypes = [np.dtype(np.float32), DType.BF16.numpy, np.dtype(np.float16)]
    chosen = {name: dtypes[int(rng.integers(3))] for name in shapes}
    family: dict[str, Model] = {}
    for number in range(models):
        model: Model = {}
        for name, shape in shapes.items():
            how = rng.integers(4) if number else 3
            before = family[f"m{rng.integers(number)}"][name] if number else None
            if how == 3 or before is None:
                model[name] = np.asarray(rng.standard_normal(shape) * 0.02, chosen[name])
            elif how == 0:
                model[name] = before
            elif how == 1:
                noise = 1 + 0.004 * rng.standard_normal(shape)
                model[name] = np.asarray(before.astype(np.float64) * noise, chosen[name])
            else:  # some rows are others
                copy = np.array(before)
                some = rng.random(shape[:1]) < 0.2
                copy[some] = (copy[some].astype(np.float64) * 1.01).astype(chosen[name])
                model[name] = copy
        model["counter"] = np.array([number], np.int64)
        family[f"m{number}"] = model
    family["m0"]["tied"] = family["m0"]["square"]
    return family


def rows_of(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables, but for times and the names of the store and of processes."""
    adapter = registry.connect(url, mode="r")
    name = adapter._sql.dialect.name  # type: ignore[attr-defined]
    found = {}
    for table, definition in TABLES.items():
        wanted = [column for column in definition.names if column != "created_at"]
        columns = adapter._sql.dialect.columns(wanted)  # type: ignore[attr-defined]
        rows = adapter._query(f"SELECT {columns} FROM {name(table)}")  # type: ignore[attr-defined]  # noqa: S608
        if table == "meta":
            others = ("store_id", b"store_id", "created_at", b"created_at")
            rows = [row for row in rows if row[0] not in others]
        found[table] = sorted(map(short, rows), key=repr)
    adapter.close()
    return found


def short(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        hashlib.sha256(bytes(v)).hexdigest() if isinstance(v, bytes | bytearray | memoryview) else v
        for v in row
    )


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all that is bounded meet its bounds with small models, and be handed over at all."""
    monkeypatch.setattr(ahead, "SMALL_BYTES", 16 * 1024)
    monkeypatch.setattr(ahead, "_READ_BYTES", 1024 * 1024)
    monkeypatch.setattr(ahead, "_MADE_BYTES", 1024 * 1024)
    monkeypatch.setattr(tensors, "SMALL_BYTES", 16 * 1024)
    monkeypatch.setattr("pydedup.ingest.places._PIECE_BLOCKS", 8)
    monkeypatch.setattr("pydedup.ingest.pages.PAGES_PER_TRANSACTION", 2)


def added(url: str, models: Mapping[str, Any], policy: Policy, count: int | None) -> Any:
    """Add two models, then the others and a new version of the first, and return all rows."""
    names = list(models)
    later = [f"{names[0]}@next", *names[2:]]
    with pydedup.open(url) as store:
        store.add_many({name: models[name] for name in names[:2]}, policy=policy, workers=count)
        given = {name: models[name.partition("@")[0]] for name in names[2:]}
        given[later[0]] = models[names[1]]
        reports = store.add_many(given, policy=policy, workers=count)
        assert store.verify().errors == []
    said = [(r.model, r.stored_bytes, r.shared_blocks, r.delta_blocks, r.pages) for r in reports]
    return said, rows_of(url)


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_any_number_of_workers_makes_the_same_store(
    tmp_path: Path, new_store: Callable[[str], str], name: str, seed: int
) -> None:
    models = family(seed)
    one = added(new_store("sqlite"), models, POLICIES[name], 1)
    assert len(one[1]["pages"]) > 2
    for count in (2, 4):
        several = added(new_store("sqlite"), models, POLICIES[name], count)
        assert several == one
    files = {}
    for member, arrays in models.items():
        files[member] = tmp_path / f"{member}.safetensors"
        save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, files[member])
    # A file lists its tensors in an order of its own, and nothing in it is tied.
    of_files = [added(new_store("sqlite"), files, POLICIES[name], n) for n in (1, 3)]
    assert of_files[0] == of_files[1]


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("backend", ["postgres", "mysql"])
def test_on_every_back_end(new_store: Callable[[str], str], backend: str) -> None:
    models = family(3)
    stores = [added(new_store(backend), models, Lossless(), count) for count in (1, 3)]
    assert stores[0] == stores[1]


@pytest.mark.usefixtures("little_room")
def test_workers_do_what_can_be_done_ahead(
    new_store: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would compare one worker with one."""
    names: dict[str, set[str]] = {"_read": set(), "_look_at": set()}
    functions = {function: getattr(ahead, function) for function in names}

    def noting(function: str, *args: Any) -> Any:
        names[function].add(threading.current_thread().name.rpartition("_")[0])
        time.sleep(0.001)  # or they are done before anybody else wakes up
        return functions[function](*args)

    for function in names:
        monkeypatch.setattr(ahead, function, partial(noting, function))
    with pydedup.open(new_store("sqlite")) as store:
        store.add_many(family(4), workers=3)
        assert all("pydedup-add" in threads for threads in names.values()), names
        for threads in names.values():
            threads.clear()
        store.add_many(family(5), workers=1)
        assert not any(names.values())
    assert not [t for t in threading.enumerate() if t.name.startswith("pydedup-add")]


@pytest.mark.parametrize("count", [1, 3])
def test_a_bad_file_leaves_the_store_as_it_was(
    tmp_path: Path, new_store: Callable[[str], str], count: int
) -> None:
    """Its header is sound, so it is found out while other models are under way."""
    url, models = new_store("sqlite"), family(6)
    good = {name: {k: a for k, a in model.items() if k != "tied"} for name, model in models.items()}
    bad = tmp_path / "bad.npz"
    np.savez(bad, first=np.ones((300, 300), np.float32), second=np.zeros((400, 400), np.float32))
    content = bytearray(bad.read_bytes())
    content[-100_000] ^= 1
    bad.write_bytes(content)
    with pydedup.open(url) as store:
        store.add("kept", good["m0"])
    before = rows_of(url)
    with pydedup.open(url) as store:
        with pytest.raises(FormatError, match=r"bad@1: .*bad\.npz"):
            store.add_many({**good, "bad": bad, "later": good["m0"]}, workers=count)
        assert store.verify().errors == []
    assert rows_of(url) == before


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize(
    ("backend", "stage"), [("sqlite", "matching"), ("sqlite", "writing"), ("postgres", "writing")]
)
def test_an_interrupt_leaves_the_store_as_it_was(
    new_store: Callable[[str], str], backend: str, stage: str
) -> None:
    url, models = new_store(backend), family(7)
    with pydedup.open(url) as store:
        store.add("kept", models["m0"])
    before = rows_of(url)

    def stop(now: str, done: int, total: int) -> None:
        if now == stage and done > total // 2:
            raise KeyboardInterrupt

    with pydedup.open(url) as store:
        with pytest.raises(KeyboardInterrupt):
            store.add_many(models, workers=4, progress=stop)
        assert store.verify().errors == []
        assert [info.address for info in store.models()] == ["kept@1"]
        store.vacuum()
    assert {**rows_of(url), "meta": before["meta"]} == before


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("backend", ["sqlite", "postgres", "mysql"])
@pytest.mark.parametrize("call", [2, 3])
def test_a_database_that_takes_no_more_pages_leaves_the_store_as_it_was(
    new_store: Callable[[str], str], backend: str, call: int
) -> None:
    """Whichever thread is told so: those beside it have written some by then, or are about to."""
    url, models = new_store(backend), family(8, 8)
    with pydedup.open(url) as store:
        store.add("kept", models["m0"])
    before = rows_of(url)
    adapter, control = inject(registry.connect(url, mode="a"))
    with pydedup.Store(adapter, 64 << 20) as store:
        control.add_fault(Fault("insert_pages", StorageFullError("no room"), call))
        with pytest.raises(StorageFullError, match="no room"):
            store.add_many(models, workers=3)
        control.clear_faults()
        assert store.verify().errors == []
        assert [info.address for info in store.models()] == ["kept@1"]
    assert {**rows_of(url), "meta": before["meta"]} == before
    assert not [t for t in threading.enumerate() if t.name.startswith("pydedup-add")]


@pytest.mark.usefixtures("little_room")
def test_pages_are_written_side_by_side_where_the_database_lets_them(
    new_store: Callable[[str], str],
) -> None:
    """Two transactions are open at once, else this waits in vain."""
    both = threading.Barrier(2, timeout=30)

    def meet() -> None:
        both.wait()

    url = new_store("postgres")
    pydedup.open(url).close()
    adapter, control = inject(registry.connect(url, mode="a"))
    with pydedup.Store(adapter, 64 << 20) as store:
        for call in (1, 2):
            control.add_fault(Fault("insert_pages", meet, call))
        store.add_many(family(9, 16), workers=2)
        assert control.calls["insert_pages"] > 2
        assert store.verify().errors == []


@pytest.mark.usefixtures("little_room")
def test_the_log_of_sqlite_is_moved_while_more_is_staged(
    new_store: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_BESIDE_BYTES", 1024 * 1024)
    url = new_store("sqlite")
    pydedup.open(url).close()
    adapter, control = inject(registry.connect(url, mode="a"))
    threads: set[str] = set()
    with pydedup.Store(adapter, 64 << 20) as store:
        control.add_fault(
            Fault("settle", lambda: threads.add(threading.current_thread().name), call=0)
        )
        store.add_many(family(9), workers=1)
        assert not threads
        store.add_many({f"later-{k}": v for k, v in family(10).items()}, workers=2)
        assert threads
        assert store.verify().errors == []


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.usefixtures("little_room")
def test_the_log_of_sqlite_does_not_grow_with_what_is_staged(
    count: int, new_store: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mib = 1024 * 1024
    monkeypatch.setattr(jobs, "_SETTLE_BYTES", 2 * mib)
    monkeypatch.setattr(jobs, "_BESIDE_BYTES", mib)
    monkeypatch.setattr(jobs, "_MOST_UNSETTLED_BYTES", 4 * mib)
    url = new_store("sqlite")
    pydedup.open(url).close()
    log = Path(f"{url.removeprefix('sqlite:///')}-wal")
    adapter, control = inject(registry.connect(url, mode="a"))
    sizes: list[int] = []
    control.add_fault(Fault("checkpoint", lambda: sizes.append(log.stat().st_size)))
    rng = np.random.default_rng(3)
    models = {f"m{i}": {"w": rng.standard_normal((1024, 1024), np.float32)} for i in range(8)}
    with pydedup.Store(adapter, 64 << 20) as store:
        store.add_many(models, policy=Exact(), workers=count)
        assert store.stats().stored_bytes > 30 * mib
    # Those, a transaction of two pages, rows, and pages of SQLite that are changed again.
    assert 0 < sizes[0] < 9 * mib


@pytest.mark.parametrize("count", [0, -1, 257, 1.5, True, "2"])
def test_numbers_of_workers_that_are_none(new_store: Callable[[str], str], count: Any) -> None:
    with (
        pydedup.open(new_store("sqlite")) as store,
        pytest.raises(ArgumentError, match="workers must be an integer"),
    ):
        store.add("m", {"w": np.ones(4)}, workers=count)


def test_how_many_work_unless_somebody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (2, 2), (3, 3), (64, 4)):
        monkeypatch.setattr(config, "threads", lambda cores=cores: cores)
        assert workers.worker_count(None, 1 << 30) == expected
        assert workers.worker_count(None, 1000) == 1
        assert workers.worker_count(7, 1000) == 7


#: Prints how many threads computations take while models are added, and afterwards.
_SEEN = """
import sys
import numpy as np
import pydedup
from pydedup import config
from pydedup.policies import Accuracy

seen = set()

def look(arrays):
    seen.add(config.threads())
    if len(sys.argv) > 2:
        raise RuntimeError("enough")
    return 1.0

with pydedup.open(sys.argv[1]) as store:
    for workers in (None, 1, 2, 200):
        seen.clear()
        rng = np.random.default_rng(0)
        models = {f"m{workers}": {"w": rng.standard_normal((256, 256), np.float32)}}
        try:
            store.add_many(models, policy=Accuracy(look, 0.1), workers=workers)
        except Exception as error:
            assert len(sys.argv) > 2, error
        print(workers, *seen, config.threads())
"""


@pytest.mark.parametrize("failing", [(), ("fails",)])
def test_computations_take_no_more_threads_than_were_asked_for(
    new_store: Callable[[str], str], failing: tuple[str, ...]
) -> None:
    """And afterwards, also after an error, as many as before."""
    done = subprocess.run(
        [sys.executable, "-c", _SEEN, new_store("sqlite"), *failing],
        env={**os.environ, "PYDEDUP_THREADS": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["None 3 3", "1 1 3", "2 2 3", "200 3 3"]
