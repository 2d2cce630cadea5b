# SPDX-License-Identifier: Apache-2.0
"""Workers and replicas close their sessions of a database before they end: none is lost to it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import Any

import pyarrow as pa
import pytest

import pydedup.ray
from pydedup.ray.cluster import import_ray
from pydedup.testing.servers import PostgresServer

from ..scoring.conftest import Tables, add, features
from .conftest import Cluster
from .test_killed_server import SLEEPS

ROWS = 600
QUERY = "SELECT id, f0, f1, f2 FROM t"
SLOW = QUERY.replace("f2", f"f2 + 0 * {SLEEPS['postgresql']} AS f2")
_PATIENCE_SECONDS = 60.0
_COMMAND = [sys.executable, "-P", "-m", "pydedup"]


class Sessions(Tables):
    """A store and a table of features on a server of its own, which counts its sessions."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        add(url, "m@1", seed=1)
        self.run("DROP TABLE IF EXISTS t, p")
        self.run("CREATE TABLE t (id INTEGER PRIMARY KEY, f0 FLOAT, f1 FLOAT, f2 FLOAT)")
        self.run(
            "INSERT INTO t VALUES (?, ?, ?, ?)",
            [[i, *map(float, row)] for i, row in enumerate(features(ROWS))],
        )
        self._lost = self._count()

    def _count(self) -> int:
        ((lost,),) = self.run("SELECT SUM(sessions_abandoned) FROM pg_stat_database")
        return int(lost)

    def others(self) -> list[Any]:
        """Sessions that are open beside the one that asks."""
        return self.run(
            "SELECT pid, state, query FROM pg_stat_activity WHERE backend_type = 'client backend' "
            "AND pid <> pg_backend_pid()"
        )

    def lost(self) -> int:
        """How many clients went away without a word, when all are gone."""
        _until(lambda: not self.others())
        return self._count() - self._lost

    def wait_for_rows(self) -> None:
        """Return when predictions are there."""
        _until(lambda: self.run("SELECT to_regclass('p')")[0][0] is not None)
        _until(lambda: self.run("SELECT COUNT(*) FROM p")[0][0])


def _until(done: Any) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def sessions(own_postgres: PostgresServer) -> Sessions:
    return Sessions(own_postgres.new_place())


@pytest.mark.parametrize("how", ["done", "stopped"])
@pytest.mark.parametrize("what", ["query", "dataset"])
def test_workers_of_a_scoring_close_what_they_have_open(
    what: str, how: str, sessions: Sessions, connected: Any
) -> None:
    data: Any = SLOW if how == "stopped" else QUERY
    columns = None
    if what == "dataset":
        x, columns = features(ROWS), ["id", "f0", "f1", "f2"]
        table = pa.table({"id": range(ROWS), **{f"f{i}": x[:, i] for i in range(3)}})
        data = import_ray("ray.data").from_arrow([table[i : i + 50] for i in range(0, ROWS, 50)])

    def progress(*_: object) -> None:
        if how == "stopped":
            raise KeyboardInterrupt

    def score() -> None:
        pydedup.ray.score(
            data,
            sessions.url,
            "m@1",
            into="p",
            columns=columns,
            workers=2 if what == "query" else 1,
            part_rows=50,
            batch=10,
            progress=progress,
        )

    if how == "stopped":  # while workers are at other parts
        with pytest.raises(KeyboardInterrupt):
            score()
    else:
        score()
    assert sessions.lost() == 0


@pytest.mark.parametrize("on", ["local", "by Ray Client"])
def test_a_scoring_that_is_interrupted_closes_all_sessions(
    on: str, sessions: Sessions, cluster: Cluster
) -> None:
    at = "local" if on == "local" else cluster.client
    command = [*_COMMAND, "score", sessions.url, "--model", "m@1", "--query", SLOW, "--into", "p"]
    command += ["--on", at, "--workers", "2", "--batch", "10"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as scoring:
        sessions.wait_for_rows()
        scoring.send_signal(signal.SIGINT)
        _, said = scoring.communicate()
    assert scoring.returncode == 130, said
    assert "interrupted" in said
    assert sessions.lost() == 0


@pytest.mark.parametrize("on", ["local", "a cluster"])
def test_replicas_close_all_sessions(on: str, sessions: Sessions, cluster: Cluster) -> None:
    at = "local" if on == "local" else cluster.address
    command = [*_COMMAND, "serve", sessions.url, "--on", at, "--port", "0", "--replicas", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        assert "pydedup serves 1 model" in serving.stdout.readline()
        assert sessions.others()
        serving.terminate()
        serving.communicate()
    assert sessions.lost() == 0
