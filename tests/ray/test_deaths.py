# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (values are made here)
"""Workers that die each time they meet a certain row: other parts are done, that one is named."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pydedup.errors import ClusterError, UnavailableError
from pydedup.ray import score_feed, score_pool, score_worker
from pydedup.ray.cluster import import_ray
from pydedup.ray.score import _result_of as result_of
from pydedup.ray.score_plan import FilePart, QueryPart
from pydedup.ray.score_pool import cause_of

from .conftest import ROWS, Scored
from .test_score import assert_right, of_folder, score

exceptions = import_ray("ray.exceptions")
#: A row in the middle, and the feature by which a worker knows it.
POISON, MARK = 777, 1e9
KILLED = "killed (SIGKILL, as the kernel does when memory runs out) or crashed (SIGSEGV)"


def deadly(deaths: Path) -> Any:
    """Return a class of workers that do not survive a row; made here, it travels by value."""
    mark, note = MARK, str(deaths)

    class ScoreWorker(score_worker.ScoreWorker):
        def _told(self, work: Any) -> str:
            real = score_worker.Store.predict

            def predict(store: Any, address: str, x: Any) -> Any:
                if (x == mark).any():
                    with open(note, "a") as file:  # noqa: PTH123
                        file.write("x")
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(store, address, x)

            score_worker.Store.predict = predict  # type: ignore[method-assign]
            return super()._told(work)

    return ScoreWorker


@pytest.fixture
def deaths(tmp_path: Path) -> Path:
    """A file with a byte for each death."""
    return tmp_path / "deaths"


@pytest.fixture
def poisoned(
    scored_file: Scored, deaths: Path, monkeypatch: pytest.MonkeyPatch, connected: Any
) -> Scored:
    scored_file.run(f"UPDATE t SET f1 = {MARK} WHERE id = {3 * POISON}")
    monkeypatch.setattr(score_pool, "ScoreWorker", deadly(deaths))
    return scored_file


@pytest.mark.parametrize("into", ["table", pytest.param("folder", marks=pytest.mark.long)])
def test_a_part_that_kills_its_workers_is_left_and_named(
    into: str, poisoned: Scored, tmp_path: Path, deaths: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target: Any = "p" if into == "table" else tmp_path / "out"
    told: list[int] = []
    with pytest.raises(ClusterError) as raised:
        score(
            poisoned.query,
            poisoned,
            target,
            workers=2,
            max_deaths=2,
            progress=lambda stage, done, total: told.append(done),
        )
    assert deaths.read_text() == "xx"
    said = str(raised.value)
    assert said.startswith("1 part of the work killed every worker that was given it")
    # 300 rows each, of keys 0, 3, ...: the third has the row.
    assert f"part 3 of 7, keys above 1797 and up to 2697 ({KILLED}: 2 times). All other" in said
    assert told[-1] == ROWS - 300

    monkeypatch.undo()
    poisoned.run(f"UPDATE t SET f1 = {poisoned.features[POISON, 1]} WHERE id = {3 * POISON}")
    report = score(poisoned.query, poisoned, target)
    assert report.resumed
    assert 0 < report.rows <= 300
    assert report.rows + report.skipped == ROWS
    assert_right(poisoned.predictions("p") if into == "table" else of_folder(target), poisoned)


@pytest.mark.long
def test_a_block_of_a_dataset_that_kills_its_workers_is_left_and_named(
    poisoned: Scored, deaths: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = score_pool.ScoreWorker

    class Feeder(score_feed._Feeder):
        """Has workers that die: it is in a process of its own."""

        def __init__(self, *given: Any) -> None:
            score_pool.ScoreWorker = worker  # type: ignore[misc]
            super().__init__(*given)

    monkeypatch.setattr(score_feed, "_Feeder", Feeder)
    x = poisoned.features.copy()
    x[POISON, 1] = MARK
    table = pa.table({"id": [3 * i for i in range(ROWS)], **{f"f{i}": x[:, i] for i in range(3)}})
    blocks = [table[start : start + 500] for start in range(0, ROWS, 500)]
    dataset = import_ray("ray.data").from_arrow(blocks)
    with pytest.raises(ClusterError) as raised:
        score(dataset, poisoned, "p", max_deaths=2)
    assert deaths.read_text() == "xx"
    said = f"block 1 of the dataset, 500 rows with keys from 1500 to 2997 ({KILLED}: 2 times)"
    assert said in str(raised.value)
    assert len(poisoned.predictions("p")) >= ROWS - 500


def test_workers_that_die_whatever_they_do_end_the_work(
    scored_file: Scored, monkeypatch: pytest.MonkeyPatch, connected: Any
) -> None:
    class ScoreWorker(score_worker.ScoreWorker):
        def ready(self) -> None:
            os._exit(3)

    monkeypatch.setattr(score_pool, "ScoreWorker", ScoreWorker)
    monkeypatch.setattr(score_pool, "_MOST_IN_A_ROW", (3, 1))
    with pytest.raises(ClusterError, match="workers died 3 times without a part done"):
        score(scored_file.query, scored_file, "p")


def test_what_keeps_workers_from_beginning_is_said_in_its_own_words(
    scored_file: Scored, monkeypatch: pytest.MonkeyPatch, connected: Any
) -> None:
    """They were called killed."""

    class ScoreWorker(score_worker.ScoreWorker):
        def __init__(self, settings: Any) -> None:
            raise OSError("no place left for postgresql://me:geheim@host/d")

    monkeypatch.setattr(score_pool, "ScoreWorker", ScoreWorker)
    monkeypatch.setattr(score_pool, "_MOST_IN_A_ROW", (2, 1))
    with pytest.raises(ClusterError) as raised:
        score(scored_file.query, scored_file, "p")
    said = "could not begin: OSError: no place left for postgresql://***@host/d); see that the same"
    assert said in str(raised.value)
    assert "killed" not in str(raised.value)


@pytest.mark.long
def test_a_dataset_that_cannot_be_read_is_said_at_once(
    scored_file: Scored, tmp_path: Path, connected: Any
) -> None:
    """It was read 20 times, and what read it called killed."""
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": [1], "f0": [1.0], "f1": [1.0], "f2": [1.0]}), file)
    dataset = import_ray("ray.data").read_parquet(str(file))
    file.unlink()
    with pytest.raises(ClusterError, match=r"the dataset cannot be read: .*x\.parquet$"):
        score(dataset, scored_file, "p")

    def refuse(block: Any) -> Any:
        if block["id"][0].as_py():
            raise ValueError("f2 is odd")
        return block

    rows = pa.table({"id": [0, 1], "f0": [1.0, 1.0], "f1": [1.0, 1.0], "f2": [1.0, 1.0]})
    dataset = import_ray("ray.data").from_arrow([rows[:1], rows[1:]])
    dataset = dataset.map_batches(refuse, batch_format="pyarrow")
    with pytest.raises(ClusterError, match=r"read: ValueError: f2 is odd$"):
        score(dataset, scored_file, "q")


def test_errors_of_an_adapters_own_keep_their_kind() -> None:
    """What told of a lost connection was a fault of Ray's worker."""
    worker = score_worker.ScoreWorker(cast(Any, SimpleNamespace(threads=1)))

    class LostError(UnavailableError):
        pass

    def lose(*_: object) -> None:
        raise LostError("away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_worker, "_PAUSE_SECONDS", 0.0)
        scorer = SimpleNamespace(close=lambda: None)
        patch.setattr(score_worker, "Scorer", lambda *_: scorer)
        told = worker._told(lose)
    with pytest.raises(UnavailableError, match=r"^away$"):
        result_of(told)


class Call:
    """What a method of an actor returns at once."""

    def __init__(self, piece: int | None = None) -> None:
        self.piece = piece


class Killing:
    """Ray, as far as a pool uses it: workers do not survive pieces below a number."""

    def __init__(self, below: int) -> None:
        self._below = below
        self.given: Counter[int | None] = Counter()

    def remote(self, **_: object) -> Any:
        method = SimpleNamespace(remote=Call)
        actor = SimpleNamespace(ready=method, part=method)
        return lambda _: SimpleNamespace(remote=lambda _: actor)

    def wait(self, calls: list[Call], num_returns: int) -> tuple[list[Call], list[Call]]:
        return calls[:num_returns], calls[num_returns:]

    def get(self, call: Call) -> str:
        self.given[call.piece] += 1
        if call.piece is not None and call.piece < self._below:
            raise exceptions.RayActorError
        return "done"

    def is_initialized(self) -> bool:
        return True

    def kill(self, _: object) -> None:
        pass


def in_pool(ray: Killing, pieces: int, max_deaths: int) -> tuple[list[int], str]:
    """Return which pieces are done, and what is said of the others."""
    settings = cast(Any, SimpleNamespace(threads=1))
    pool = score_pool.Pool(ray, settings, "part", 2, max_deaths, lambda number, _: f"part {number}")
    done: list[int] = []
    with pytest.raises(ClusterError) as raised:
        done.extend(number for number, _ in pool.results((n, n) for n in range(pieces)))
    return done, str(raised.value)


def test_each_of_many_parts_that_kill_is_left_and_named() -> None:
    """Seven, each tried four times, were told as workers that die whatever they do."""
    ray = Killing(12)
    done, said = in_pool(ray, 40, 4)
    assert done == list(range(12, 40))
    assert said.startswith("12 parts of the work killed every worker that was given it")
    assert f"part 4 ({KILLED}: 4 times); and 7 more" in said
    assert [ray.given[n] for n in range(40)] == [4] * 12 + [1] * 28
    ray = Killing(1000)
    done, said = in_pool(ray, 1000, 4)
    assert not done
    assert said.startswith("Ray's workers died 20 times without a part done")
    assert sum(ray.given[n] for n in range(1000)) == 20


class Dying:
    """Ray, as far as it is used to read a dataset: each reader tells of some blocks, and dies."""

    def __init__(self, *lives: list[int]) -> None:
        self._lives = iter(lives)
        self._left: list[int] = []
        self.begun = 0

    def remote(self, **_: object) -> Any:
        return lambda _: SimpleNamespace(remote=self._begin)

    def _begin(self, *_: object) -> Any:
        self.begun += 1
        assert self.begun < 100, "there is no end"
        self._left = list(next(self._lives))
        return SimpleNamespace(next=SimpleNamespace(remote=lambda: None))

    def get(self, _: object) -> tuple[int, str]:
        if not self._left:
            raise exceptions.RayActorError
        return 0, json.dumps({"rows": self._left.pop(0)})

    def is_initialized(self) -> bool:
        return True

    def kill(self, _: object) -> None:
        pass


def test_a_dataset_whose_reader_dies_at_the_same_place_each_time_is_given_up() -> None:
    """It was read again without end: the blocks before that place are told each time."""
    ray = Dying([5, 5], *[[0, 0]] * 200)
    with pytest.raises(ClusterError, match="died 20 times without progress"):
        list(score_feed._of_dataset(ray, None, cast(Any, None), 1, 4))
    assert ray.begun == 20
    # Fewer blocks of which rows were written, and more that had been done, are both a step ahead.
    ray = Dying([5, 5], *[[0]] * 18, [5], *[[0, 0]] * 18, [0, 0, 0], *[[0, 0]] * 200)
    with pytest.raises(ClusterError, match="died 20 times without progress"):
        list(score_feed._of_dataset(ray, None, cast(Any, None), 1, 4))
    assert ray.begun == 58


def test_what_ray_tells_of_a_death_is_said() -> None:
    """Ray's own texts, of 2.60."""
    died = exceptions.RayActorError
    node = died(error_msg="x\nThe actor died because its node has died. Node Id: 1\n\tthe actor's")
    assert cause_of(node) == "its machine was lost"
    assert cause_of(died(preempted=True)) == "its machine was taken away (preempted)"
    memory = exceptions.OutOfMemoryError(
        "1 worker(s) were killed due to the node running low on memory."
    )
    assert cause_of(memory) == "ended by Ray, as its machine ran low on memory"
    crash = died(
        error_msg="the process was killed by the OOM killer ... of the OOMing node), consider"
    )
    assert cause_of(crash) == KILLED


def test_parts_are_named_by_what_they_hold() -> None:
    assert str(QueryPart(None, None)) == "all keys"
    assert str(QueryPart("a", None)) == "keys above 'a'"
    assert str(QueryPart(None, b"b" * 999)) == f"keys up to b'{'b' * 75}..."
    assert (
        str(FilePart("/x.parquet", 9, 2, 100, 200))
        == "rows 100 to 199 of row group 2 of /x.parquet"
    )
