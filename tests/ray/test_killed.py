# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""SIGKILL of workers and of drivers at random moments: each row is there once, and of one version.

In `make test` a few kills, in `make crash` as many as PYDEDUP_CRASH_ROUNDS says, 50 at most: each
takes seconds, as processes of Ray begin slowly.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pydedup
import pydedup.ray
from pydedup.errors import ClusterError
from pydedup.ray.cluster import import_ray

from .conftest import ROWS, Cluster, Scored
from .test_score import assert_right, of_folder

ROUNDS = min(50, int(os.environ.get("PYDEDUP_CRASH_ROUNDS", "0")))
#: Of what Ray calls the processes that work for us, whatever they are at.
WORKERS = ("ray::ScoreWorker", "ray::_Feeder")


class Killer(threading.Thread):
    """Kills one worker of a cluster after another, at random moments."""

    def __init__(self, cluster: Cluster, kills: int, pause: float, ended: Callable[[], None]):
        super().__init__(daemon=True)
        self._cluster, self._kills, self._pause, self._ended = cluster, kills, pause, ended
        self.killed: list[str] = []
        self.done = threading.Event()
        self._chance = random.Random(os.getpid())

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self._cluster.pid).children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(WORKERS):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def run(self) -> None:
        while len(self.killed) < self._kills and not self.done.is_set():
            if not self.workers():
                self.done.wait(0.02)
                continue
            self.done.wait(self._chance.random() * self._pause)
            try:
                victim = self._chance.choice(self.workers())
                name = victim.cmdline()[0]
                victim.kill()
            except (psutil.Error, IndexError):
                continue
            self.killed.append(name)
        self._ended()


def slow(query: str, loops: str) -> str:
    """Return a query of SQLite's whose rows come slowly: a part is long enough to be killed in."""
    count = f"(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {loops})"
    return query.replace("f2 FROM", f"f2 + 0 * {count} SELECT COUNT(*) + t.id FROM n) FROM")


def dataset_of(scored: Scored, pace: Path) -> Any:
    """Return a dataset whose rows come slowly as long as there is a file."""
    at = str(pace)
    pace.touch()

    def slowly(block: Any) -> Any:
        time.sleep(0.2 * os.path.exists(at))  # noqa: PTH110
        return block

    x = scored.features
    table = pa.table({"id": [3 * i for i in range(ROWS)], **{f"f{i}": x[:, i] for i in range(3)}})
    blocks = [table[start : start + 50] for start in range(0, ROWS, 50)]
    found = import_ray("ray.data").from_arrow(blocks)
    return found.map_batches(slowly, batch_size=None, batch_format="pyarrow")


@pytest.mark.timeout(300 + 30 * ROUNDS)
@pytest.mark.parametrize(
    "what",
    [
        "query to table",
        pytest.param("query to folder", marks=pytest.mark.long),
        pytest.param("dataset to table", marks=pytest.mark.long),
    ],
)
def test_killed_workers_lose_nothing(
    what: str, scored_file: Scored, tmp_path: Path, cluster: Cluster, connected: Any
) -> None:
    source, _, into = what.split()
    # What reads a dataset takes some seconds to begin anew.
    wanted, pause = (max(1, ROUNDS // 5), 3.0) if source == "dataset" else (max(3, ROUNDS), 1.0)
    pace = tmp_path / "pace"
    scored_file.run("CREATE TABLE pace (loops INTEGER)")
    scored_file.run("INSERT INTO pace VALUES (1)")

    def faster() -> None:
        pace.unlink(missing_ok=True)
        scored_file.run("UPDATE pace SET loops = 1")

    # Rows come slowly as long as there is somebody to kill, and so all of it is one work: slowly
    # enough that a fast machine (10 ns a loop) is not done before, but a part takes less than the
    # time between two kills.
    scored_file.run(f"UPDATE pace SET loops = {max(500_000, 20_000 * wanted)}")
    query = slow(scored_file.query, "(SELECT loops FROM pace)")
    data = dataset_of(scored_file, pace) if source == "dataset" else query
    target: Any = "p" if into == "table" else tmp_path / "out"
    killer = Killer(cluster, wanted, pause, faster)
    killer.start()
    begun, ends = time.monotonic(), 0
    try:
        while True:
            try:
                report = pydedup.ray.score(
                    data,
                    scored_file.url,
                    "m@prod",
                    into=target,
                    columns=["id", "f0", "f1", "f2"] if source == "dataset" else None,
                    workers=1 if source == "dataset" else 2,
                    part_rows=10,
                    batch=10,
                    max_deaths=wanted + 1,
                )
                break
            except ClusterError as error:
                # On a busy machine workers may be killed 20 times before one has done anything.
                assert "run it again to continue" in str(error)  # noqa: PT017
                ends += 1
                assert ends <= wanted // 20
    finally:
        killer.done.set()
        killer.join()
    assert len(killer.killed) == wanted
    assert report.rows + report.skipped == ROWS
    if into == "table":
        keys = [key for (key,) in scored_file.run(f"SELECT id FROM {target}")]
    else:
        assert not list(target.glob(".*"))
        keys = pq.read_table(target)["id"].to_pylist()
    lost = {3 * i for i in range(ROWS)} - set(keys)
    victims = ", ".join(f"{n} of {name}" for name, n in Counter(killer.killed).items())
    print(
        f"{what}: {wanted} kills in {time.monotonic() - begun:.0f} s ({victims}), ended {ends} "
        f"times: {len(keys)} rows, {len(keys) - len(set(keys))} twice, {len(lost)} lost"
    )
    found = scored_file.predictions(target) if into == "table" else of_folder(target)
    assert_right(found, scored_file)


DRIVER = """
import os, pathlib, sys
import pydedup.ray
url, query, into, address = sys.argv[1:]
target = into if into.isidentifier() else pathlib.Path(into)
def tell(stage, done, total):
    print(done, flush=True)
pydedup.ray.score(query, url, "m@prod", into=target, on=address, workers=2, part_rows=100,
    batch=10, progress=tell)
"""


@pytest.mark.timeout(300 + 60 * ROUNDS)
@pytest.mark.parametrize("into", ["table", pytest.param("folder", marks=pytest.mark.long)])
def test_a_killed_driver_goes_on(
    into: str, scored_file: Scored, tmp_path: Path, cluster: Cluster, connected: Any
) -> None:
    chance = random.Random(os.getpid())
    begun, resumed, skipped = time.monotonic(), 0, 0
    number = -1
    scored_file.run("CREATE TABLE pace (loops INTEGER)")
    scored_file.run("INSERT INTO pace VALUES (1)")
    query = slow(scored_file.query, "(SELECT loops FROM pace)")
    # Rounds in which the driver was done before it was killed say little: some more, if all were.
    while number + 1 < max(1, ROUNDS) or (not resumed and number < ROUNDS + 9):
        number += 1
        target: Any = f"p{number}" if into == "table" else tmp_path / f"out{number}"
        with pydedup.open(scored_file.url) as store:
            store.alias("m", "prod", "1")
        # On a fast machine (10 ns a loop) two seconds of work, of which the driver sees half a one.
        scored_file.run("UPDATE pace SET loops = 200000")
        arguments = [sys.executable, "-P", "-c", DRIVER, scored_file.url, query, str(target)]
        driver = subprocess.Popen(
            [*arguments, cluster.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert driver.stdout is not None
        first = driver.stdout.readline()
        assert first, driver.communicate()[1]
        time.sleep(chance.random() / 2)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        scored_file.run("UPDATE pace SET loops = 1")
        with pydedup.open(scored_file.url) as store:
            store.alias("m", "prod", "2")
        report = pydedup.ray.score(
            query, scored_file.url, "m@prod", into=target, workers=1, part_rows=100, batch=10
        )
        assert report.model in ("m@1", "m@2")
        assert report.resumed == (report.model == "m@1")
        assert report.rows + report.skipped == ROWS
        assert report.skipped >= int(first)
        # Also of a driver that was done before it was killed: none of its rows is written again.
        found = scored_file.predictions(target) if into == "table" else of_folder(target)
        assert_right(found, scored_file)
        resumed, skipped = resumed + report.resumed, skipped + report.skipped
        with pydedup.open(scored_file.url) as store:
            assert store._adapter.jobs() == []
    seconds = time.monotonic() - begun
    print(
        f"drivers to {into}: {number + 1} kills in {seconds:.0f} s, {resumed} in the middle, after "
        f"{skipped / (number + 1):.0f} of {ROWS} rows on the average"
    )
    assert resumed
