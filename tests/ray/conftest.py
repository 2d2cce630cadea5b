# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""One Ray cluster for all of these tests, of two CPUs, with a folder and ports of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import pydedup
from pydedup.ray.cluster import PROXY_SECONDS
from pydedup.testing.servers import PostgresServer, unused_port

from ..scoring.conftest import Tables, add, features, weights

_PATIENCE_SECONDS = 240.0


@dataclass(frozen=True)
class Cluster:
    """Where a cluster is: for a process of its machine, and for Ray Client."""

    address: str
    client: str
    folder: str
    pid: int


def free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(unused_port())
    return [*ports]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster that runs while the tests do."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with started() as made:
        yield made


@contextlib.contextmanager
def started(cpus: int = 2, **environment: str) -> Iterator[Cluster]:
    """Start a cluster, in an environment that may have more, and end it.

    Ray gives up after two minutes in which its processes did not find each other: where a port was
    taken meanwhile, or the machine had much else to do, they do the next time.
    """
    with contextlib.ExitStack() as running:
        try:
            cluster = running.enter_context(_begun(cpus, environment))
        except NotStartedError:
            cluster = running.enter_context(_begun(cpus, environment))
        yield cluster


class NotStartedError(Exception):
    """Ray did not start."""


@contextlib.contextmanager
def _begun(cpus: int, environment: dict[str, str]) -> Iterator[Cluster]:
    port, client, *others = free_ports(7)
    named = ("node-manager", "object-manager", "dashboard-agent-grpc", "metrics-export")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as tmp:
        environment = os.environ | {"RAY_TMPDIR": tmp} | environment
        # Ray's proxy for clients forks while it speaks gRPC; with gRPC's handlers of forks, what it
        # starts dies now and then, and the client waits for it for 30 seconds.
        environment["GRPC_ENABLE_FORK_SUPPORT"] = "0"
        environment["RAY_raylet_start_wait_time_s"] = "120"  # a machine may have much else to do
        environment.setdefault(PROXY_SECONDS, "60")  # as of a private Ray of ours
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={tmp}"]
        command += [f"--ray-client-server-port={client}", f"--num-cpus={cpus}"]
        command += [
            "--disable-usage-stats",
            "--include-dashboard=false",
            f"--object-store-memory={128 << 20}",
        ]
        command += ["--include-log-monitor=false", "--no-monitor"]  # of which nobody asks anything
        options = zip((f"--{name}-port" for name in named), others[:3] + others[4:], strict=True)
        command += [f"{name}={number}" for name, number in options]
        log = Path(tmp) / "start.log"
        with log.open("w") as out:
            head = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            for number in (port, client):
                _wait_for(number, head, log)
            yield Cluster(f"127.0.0.1:{port}", f"ray://127.0.0.1:{client}", tmp, head.pid)
        finally:
            # Not asked to end: it would wait for those that are connected.
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in [*psutil.Process(head.pid).children(recursive=True), head]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
            head.wait()


def _wait_for(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end and head.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise NotStartedError(log.read_text()[-2000:])


@pytest.fixture(scope="session")
def connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, this process connected to the cluster."""
    from pydedup.ray.cluster import attached

    with attached(cluster.address) as ray:
        yield ray


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is refused before it connects: as if no test had connected this process."""
    from pydedup.ray.cluster import import_ray

    monkeypatch.setattr(import_ray(), "is_initialized", lambda: False)


ROWS = 2_000


class Scored(Tables):
    """A store with two versions of a model, ``m@prod`` the first, and a table of features."""

    def __init__(self, url: str, *, filled: bool = False) -> None:
        super().__init__(url)
        self.weights = {version: weights(version) for version in (1, 2)}
        self.features = features(ROWS)
        self.query = "SELECT id, f0, f1, f2 FROM t"
        if filled:
            return
        for version in (1, 2):
            add(url, f"m@{version}", seed=version)
        with pydedup.open(url) as store:
            store.alias("m", "prod", "1")
        self.run("CREATE TABLE t (id BIGINT PRIMARY KEY, f0 REAL, f1 REAL, f2 REAL)")
        rows = [[3 * i, *map(float, row)] for i, row in enumerate(self.features)]
        self.run("INSERT INTO t VALUES (?, ?, ?, ?)", rows)

    def predictions(self, table: str = "p") -> dict[Any, float]:
        """What a table has, whose rows must have keys of their own."""
        rows = self.run(f"SELECT id, prediction FROM {table}")
        assert len({key for key, _ in rows}) == len(rows)
        return dict(rows)

    def wanted(self, version: int = 1) -> np.ndarray:
        return (self.features @ self.weights[version].T)[:, 0]


@pytest.fixture
def scored(store_url: str) -> Iterator[Scored]:
    """On each back end in turn."""
    made = Scored(store_url)
    yield made
    if made.kind != "sqlite":
        for table in ("t", "p", "q"):
            made.run(f"DROP TABLE IF EXISTS {table}")


@pytest.fixture(scope="session")
def scored_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of SQLite, to be copied: filling one takes seconds."""
    path = tmp_path_factory.mktemp("scored") / "store.db"
    Scored(f"sqlite:///{path}")
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # all of it is in the file
    return path


@pytest.fixture
def scored_file(scored_once: Path, tmp_path: Path) -> Scored:
    """On SQLite, where the back end does not matter."""
    shutil.copyfile(scored_once, tmp_path / "store.db")
    return Scored(f"sqlite:///{tmp_path / 'store.db'}", filled=True)


def slowly(tables: Tables, seconds: float = 0.006) -> str:
    """Return what is f2, and takes some time for each row that is read.

    Not for each row when a query is cut into parts. There, PostgreSQL leaves out what nobody needs,
    but no call that may have effects, such as pg_sleep itself.
    """
    if tables.kind == "mysql":
        return f"f2 + 0 * SLEEP({seconds})"
    tables.run(
        "CREATE OR REPLACE FUNCTION slowly(float) RETURNS float STABLE LANGUAGE plpgsql AS "
        f"'BEGIN PERFORM pg_sleep({seconds}); RETURN $1; END'"
    )
    return "slowly(f2)"


class Sessions(Tables):
    """A store and a table of features on a server of its own, which counts its sessions."""

    ROWS = 600

    def __init__(self, url: str) -> None:
        super().__init__(url)
        add(url, "m@1", seed=1)
        self.run("DROP TABLE IF EXISTS t, p")
        self.run("CREATE TABLE t (id INTEGER PRIMARY KEY, f0 FLOAT, f1 FLOAT, f2 FLOAT)")
        self.run(
            "INSERT INTO t VALUES (?, ?, ?, ?)",
            [[i, *map(float, row)] for i, row in enumerate(features(self.ROWS))],
        )
        #: Of the features: one whose rows come at once, and one whose rows come slowly.
        self.query = "SELECT id, f0, f1, f2 FROM t"
        self.slow_query = self.query.replace("f2", f"{slowly(self)} AS f2")
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

    def end(self) -> None:
        """End what others have open, without that it counts as lost."""
        self.run("SELECT pg_terminate_backend(?)", [[pid] for pid, *_ in self.others()])
        _until(lambda: not self.others())

    def wait_for_table(self) -> None:
        """Return when there is one for predictions."""
        _until(lambda: self.run("SELECT to_regclass('p')")[0][0] is not None, seconds=200)

    def wait_for_rows(self) -> None:
        """Return when predictions are there."""
        self.wait_for_table()
        _until(lambda: self.run("SELECT COUNT(*) FROM p")[0][0])


def _until(done: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def sessions(own_postgres: PostgresServer) -> Sessions:
    return Sessions(own_postgres.new_place())


@pytest.fixture
def parquet(scored_file: Scored, tmp_path: Path) -> Path:
    """The features as two files, a folder below the other, with a column more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {f"f{i}": scored_file.features[:, i] for i in range(3)}
    table = pa.table({"note": ["n"] * ROWS, "id": [3 * i for i in range(ROWS)], **columns})
    (tmp_path / "in" / "more").mkdir(parents=True)
    pq.write_table(table[:900], tmp_path / "in" / "a.parquet", row_group_size=700)
    pq.write_table(table[900:], tmp_path / "in" / "more" / "b.parquet")
    return tmp_path / "in"
