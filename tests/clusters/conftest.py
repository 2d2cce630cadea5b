# SPDX-License-Identifier: Apache-2.0
"""Clusters of MariaDB: two nodes of Galera, and Spider in front of two servers.

They take a minute to start, and packages that the other tests do without, so that only
`make test-clusters` (PYDEDUP_CLUSTERS=1) runs these. PYDEDUP_REQUIRE_BACKENDS=galera,spider turns
the skip of a missing package into a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pydedup.testing.mysql_servers import MysqlServer, mysql_connection
from pydedup.testing.servers import unused_port

GALERA = Path("/usr/lib/galera/libgalera_smm.so")
SPIDER = Path("/usr/lib/mysql/plugin/ha_spider.so")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("PYDEDUP_CLUSTERS") != "1":
        skip = pytest.mark.skip(reason="`make test-clusters` runs the tests of clusters")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


def need(backend: str, *files: Path) -> None:
    """Skip, or fail where the backend is required, when one of the files is missing."""
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        said = f"{', '.join(missing)} is not installed (apt-get install mariadb-server galera-4 "
        said += "mariadb-plugin-spider rsync)"
        required = os.environ.get("PYDEDUP_REQUIRE_BACKENDS", "").split(",")
        if backend in required:
            pytest.fail(f"PYDEDUP_REQUIRE_BACKENDS names {backend}, but {said}")
        pytest.skip(said)


class GaleraNode:
    """A node of a cluster, run by the user `mysql`, as its scripts want it."""

    def __init__(self, folder: Path, peer: GaleraNode | None = None) -> None:
        folder.mkdir()
        self.data, self.socket = folder / "data", folder / "sock"
        self.log, self.group = folder / "log", unused_port()
        user = "mysql" if os.geteuid() == 0 else None
        if user is not None:
            shutil.chown(folder, user)
        search = os.environ.get("PATH", os.defpath) + ":/usr/sbin"
        common = ["--no-defaults", f"--datadir={self.data}"]
        setup = ["mariadb-install-db", *common, "--skip-test-db"]
        setup += ["--auth-root-authentication-method=normal", *([f"--user={user}"] * bool(user))]
        subprocess.run(setup, check=True, capture_output=True, env={**os.environ, "PATH": search})
        address = f"gcomm://127.0.0.1:{peer.group}" if peer else "gcomm://"
        ports = f"gmcast.listen_addr=tcp://127.0.0.1:{self.group};ist.recv_addr=127.0.0.1:"
        self._command = ["mariadbd", *common, f"--socket={self.socket}", f"--port={unused_port()}"]
        self._command += ["--bind-address=127.0.0.1", f"--log-error={self.log}", "--wsrep-on=ON"]
        self._command += [f"--wsrep-provider={GALERA}", f"--wsrep-cluster-address={address}"]
        self._command += [f"--wsrep-provider-options={ports}{unused_port()};gcache.size=64M"]
        self._command += [f"--wsrep-node-address=127.0.0.1:{self.group}"]
        self._command += [f"--wsrep-sst-receive-address=127.0.0.1:{unused_port()}"]
        self._command += ["--wsrep-sst-method=rsync", "--binlog-format=ROW"]
        self._command += ["--innodb-autoinc-lock-mode=2", "--innodb-buffer-pool-size=64M"]
        self._command += ["--innodb-flush-log-at-trx-commit=0", "--max-allowed-packet=64M"]
        self._command += [*([f"--user={user}"] * bool(user))]
        self._env = {**os.environ, "PATH": search}
        self.start()

    def url(self, database: str = "pydedup") -> str:
        return f"mysql://root@localhost/{database}?unix_socket={self.socket}".replace(
            str(self.socket), str(self.socket).replace("/", "%2F")
        )

    def start(self) -> None:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, env=self._env, stdout=quiet, stderr=quiet)
        end = time.monotonic() + 120
        while True:
            try:
                if self.status("wsrep_ready") == "ON":
                    return
            except Exception as error:  # whatever the driver says of a server that is not there
                if self._process.poll() is not None or time.monotonic() > end:
                    tail = self.log.read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"no node ({error}); its log ends with:\n{tail}") from error
            time.sleep(0.2)

    def status(self, name: str) -> str:
        with mysql_connection(self.url("")) as connection, connection.cursor() as cursor:
            cursor.execute("SET SESSION wsrep_sync_wait = 0")  # told also by a node that waits
            cursor.execute("SHOW STATUS LIKE %s", (name,))
            return str(cursor.fetchone()[1])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(60)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)


@pytest.fixture(scope="session")
def galera(server_folder: Path) -> Iterator[tuple[GaleraNode, GaleraNode]]:
    """Two nodes of one cluster."""
    need("galera", GALERA, Path("/usr/sbin/mariadbd"), Path("/usr/bin/rsync"))
    first = GaleraNode(server_folder / "galera-1")
    second = None
    try:
        second = GaleraNode(server_folder / "galera-2", first)
        yield first, second
    finally:
        for node in (second, first):
            if node is not None:
                node.stop()


@pytest.fixture
def spider(server_folder: Path, run: Callable[..., Any]) -> Iterator[list[MysqlServer]]:
    """A server with the engine Spider, and two that are to have parts of a table."""
    need("spider", SPIDER, Path("/usr/sbin/mariadbd"))
    servers = []
    try:
        for number in range(3):
            options = ("--plugin-load-add=ha_spider", "--spider-remote-sql-log-off=0")
            servers.append(
                MysqlServer(server_folder / f"spider-{number}", *(options if not number else ()))
            )
        yield servers
    finally:
        for server in servers:
            server.stop()


@pytest.fixture(scope="session")
def run(mysql_run: Callable[..., Any]) -> Callable[..., Any]:
    """Run statements at a URL and return the rows of the last."""
    return mysql_run
