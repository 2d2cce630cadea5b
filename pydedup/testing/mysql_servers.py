# SPDX-License-Identifier: Apache-2.0
"""Private servers of MariaDB, or of MySQL, for tests and benchmarks.

Of MariaDB the programs on the PATH are taken. Where PYDEDUP_TEST_MYSQL_PROGRAMS names a folder with
``mysqld``, servers are of that MySQL in MariaDB's place (``make test-mysql``). What is said of
folders in :mod:`pydedup.testing.servers` holds here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from pydedup.testing.servers import (
    START_SECONDS,
    ServerMissingError,
    make_certificate,
    password_of,
    unused_name,
    unused_port,
)

__all__ = ["MysqlServer", "is_mysql", "mysql_connection"]


class MysqlServer:
    """A private server whose files are in a folder. ``options`` are of its command line.

    MySQL is given those alone that it knows: they may be of MariaDB.
    """

    def __init__(self, data: Path, *options: str) -> None:
        self._socket, self._log = data.with_suffix(".sock"), data.with_suffix(".log")
        self.port = unused_port()
        self.folder = data
        self.url = f"mysql://root@localhost/pydedup?unix_socket={quote(str(self._socket), safe='')}"
        user = ["--user=root"] if os.geteuid() == 0 else []
        # --no-defaults: what the machine's own server is configured to do must not matter.
        common = ["--no-defaults", *user, f"--datadir={data}"]
        # One that starts deletes the temporary tables that it finds, of whichever server.
        temporary = data.with_suffix(".tmp")
        temporary.mkdir()
        common.append(f"--tmpdir={temporary}")
        server, own = (_mysql if is_mysql() else _mariadb)(common)
        self.certificate, key = make_certificate(data.with_suffix(".tls"))
        self._command = [server, *common, f"--socket={self._socket}", f"--port={self.port}"]
        self._command += ["--bind-address=127.0.0.1", f"--ssl-cert={self.certificate}"]
        self._command += [f"--ssl-key={key}", f"--log-error={self._log}", *own]
        self._command += ["--max-allowed-packet=1G", "--skip-name-resolve"]
        self._command += ["--innodb-data-file-path=ibdata1:12M:autoextend:max:48M"]
        self._command += ["--innodb-buffer-pool-size=128M", *_known(options)]
        self.start()

    def start(self, *options: str) -> None:
        """Start it, with more options for this time, and wait until it answers."""
        command, quiet = [*self._command, *_known(options)], subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
        try:
            _create_database(self._process, self._socket, self._log)
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """End it at once, as a failing machine does."""
        self._process.kill()
        self._process.wait(START_SECONDS)

    def stop(self) -> None:
        """End it in order."""
        self._process.terminate()
        self._process.wait(START_SECONDS)

    def new_place(self) -> str:
        """Return the URL of an empty place for a store."""
        name = unused_name()
        with mysql_connection(self.url) as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name}")
        return urlsplit(self.url)._replace(path=f"/{name}").geturl()


def is_mysql() -> bool:
    """Return whether servers are of MySQL, and not of MariaDB."""
    return "PYDEDUP_TEST_MYSQL_PROGRAMS" in os.environ


def _mariadb(common: list[str]) -> tuple[str, list[str]]:
    """Fill the folder of a server; return its program and options of MariaDB alone."""
    search = os.environ.get("PATH", os.defpath) + ":/usr/sbin"
    server = shutil.which("mariadbd", path=search)
    install = shutil.which("mariadb-install-db", path=search)
    if server is None or install is None:
        raise ServerMissingError("mariadbd is not installed (apt-get install mariadb-server-core)")
    setup = [install, *common, "--skip-test-db", "--auth-root-authentication-method=normal"]
    setup.append("--debug-no-sync")  # what is lost when the machine stops now is made again
    subprocess.run(setup, check=True, capture_output=True)
    return server, []


def _mysql(common: list[str]) -> tuple[str, list[str]]:
    """Fill the folder of a server; return its program and options of MySQL alone."""
    folder = os.environ["PYDEDUP_TEST_MYSQL_PROGRAMS"]
    server = shutil.which("mysqld", path=folder)
    if server is None:
        raise ServerMissingError(f"PYDEDUP_TEST_MYSQL_PROGRAMS={folder} has no mysqld")
    setup = [server, *common, "--initialize-insecure", "--secure-file-priv="]
    setup.append("--innodb-flush-method=nosync")  # as for MariaDB
    subprocess.run(setup, check=True, capture_output=True)
    # Its second protocol wants a port and a socket that each server would take.
    return server, ["--mysqlx=OFF", "--secure-file-priv="]


def _known(options: tuple[str, ...]) -> list[str]:
    """Return options as the server has them: what MySQL calls otherwise, or knows not at all."""
    if not is_mysql():
        return list(options)
    renamed = {"--debug-no-sync": "--innodb-flush-method=nosync"}
    return [renamed.get(option, option) for option in options]


def _create_database(process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    """Wait until the server answers, then make the database that tests use."""
    import mysql.connector

    url = f"mysql://root@localhost?unix_socket={quote(str(path), safe='')}"
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            connection = mysql_connection(url)
            break
        except mysql.connector.Error as error:
            if process.poll() is not None or time.monotonic() > end:
                tail = log.read_text(errors="replace")[-2000:] if log.exists() else "no log"
                raise RuntimeError(
                    f"the server does not answer ({error}); its log ends with:\n{tail}"
                ) from error
            time.sleep(0.1)
    with connection as opened, opened.cursor() as cursor:
        cursor.execute(
            "CREATE DATABASE IF NOT EXISTS pydedup CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
        )


def mysql_connection(url: str) -> contextlib.closing[Any]:
    """Open a connection that the adapter knows nothing of, as a context manager that closes it."""
    import mysql.connector

    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    where: dict[str, Any] = {"host": parts.hostname, "port": parts.port or 3306}
    if "unix_socket" in options:
        where = {"unix_socket": options["unix_socket"]}
    connection = mysql.connector.connect(
        user=parts.username,
        password=password_of(url),
        database=parts.path.lstrip("/") or None,
        charset="utf8mb4",
        collation="utf8mb4_bin",
        autocommit=True,
        **where,
    )
    return contextlib.closing(connection)
