# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""SIGKILL of workers and of drivers at random moments: each row is there once, and of one version.

In `make test` a few kills, in `make crash` as many as PYDEDUP_CRASH_ROUNDS says.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

import pydedup
import pydedup.ray

from .conftest import ROWS, Cluster, Scored
from .test_score import assert_right, of_folder

ROUNDS = int(os.environ.get("PYDEDUP_CRASH_ROUNDS", "0"))
#: Of what Ray calls its processes while they work for us.
WORKERS = ("ray::MapWorker", "ray::_Feeder", "ray::MapBatches")


class Killer(threading.Thread):
    """Kills one worker of a cluster after another, at random moments."""

    def __init__(self, cluster: Cluster, kills: int, pause: float) -> None:
        super().__init__(daemon=True)
        self._cluster, self._left, self._pause = cluster, kills, pause
        self.killed: list[str] = []
        self.done = threading.Event()
        self._chance = random.Random(os.getpid())

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self._cluster.pid).children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if title.startswith(WORKERS):
                found.append(process)
        return found

    def run(self) -> None:
        while self._left and not self.done.is_set():
            workers = self.workers()
            if not any("MapWorker" in " ".join(worker.cmdline()) for worker in workers):
                self.done.wait(0.05)
                continue
            self.done.wait(self._chance.random() * self._pause)
            try:
                victim = self._chance.choice(self.workers())
                name = victim.cmdline()[0]
                victim.kill()
            except (psutil.Error, IndexError):
                continue
            self.killed.append(name)
            self._left -= 1


def slow(query: str) -> str:
    """Return a query of SQLite's whose rows come slowly: a part is long enough to be killed in."""
    count = "(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 4000)"
    return query.replace("f2 FROM", f"f2 + 0 * {count} SELECT COUNT(*) + t.id FROM n) FROM")


@pytest.mark.timeout(300 + 60 * ROUNDS)
@pytest.mark.parametrize("into", ["table", "folder"])
def test_killed_workers_lose_nothing(
    into: str, scored_file: Scored, tmp_path: Path, cluster: Cluster, connected: Any
) -> None:
    for number in range(max(1, ROUNDS // 6)):
        target: Any = f"p{number}" if into == "table" else tmp_path / f"out{number}"
        killer = Killer(cluster, 3, 2.0)
        killer.start()
        try:
            report = pydedup.ray.score(
                slow(scored_file.query),
                scored_file.url,
                "m@prod",
                into=target,
                workers=2,
                part_rows=100,
                batch=10,
            )
        finally:
            killer.done.set()
            killer.join()
        assert killer.killed, "the work ended before anybody was killed"
        assert report.rows + report.skipped == ROWS
        found = scored_file.predictions(target) if into == "table" else of_folder(target)
        assert_right(found, scored_file)
        if into == "folder":
            assert not list(target.glob(".*"))
            assert sum(pq.read_metadata(p).num_rows for p in target.glob("*.parquet")) == ROWS


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
@pytest.mark.parametrize("into", ["table", "folder"])
def test_a_killed_driver_goes_on(
    into: str, scored_file: Scored, tmp_path: Path, cluster: Cluster, connected: Any
) -> None:
    chance = random.Random(os.getpid())
    for number in range(max(1, ROUNDS // 2)):
        target: Any = f"p{number}" if into == "table" else tmp_path / f"out{number}"
        with pydedup.open(scored_file.url) as store:
            store.alias("m", "prod", "1")
        query = slow(scored_file.query)
        arguments = [sys.executable, "-P", "-c", DRIVER, scored_file.url, query, str(target)]
        driver = subprocess.Popen(
            [*arguments, cluster.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert driver.stdout is not None
        first = driver.stdout.readline()
        assert first, driver.communicate()[1]
        time.sleep(chance.random())
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        with pydedup.open(scored_file.url) as store:
            store.alias("m", "prod", "2")
        report = pydedup.ray.score(
            query, scored_file.url, "m@prod", into=target, workers=2, part_rows=100, batch=10
        )
        assert report.model in ("m@1", "m@2")
        assert report.resumed == (report.model == "m@1")
        assert report.rows + report.skipped == ROWS
        assert report.skipped >= int(first)
        if report.resumed:
            found = scored_file.predictions(target) if into == "table" else of_folder(target)
            assert_right(found, scored_file)
        with pydedup.open(scored_file.url) as store:
            assert store._adapter.jobs() == []
