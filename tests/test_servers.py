# SPDX-License-Identifier: Apache-2.0
"""The private database servers of conftest.py: they run, and carry bytes unchanged.

They are the ground that the adapters' tests stand on; what an adapter does is tested elsewhere.
And what may be skipped where something cannot be had.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
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
        assert connection.info.server_version >= 150_000


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


@pytest.mark.parametrize("required", ["sqlite", "sqlite,disk"])
def test_a_disk_that_cannot_be_had_is_skipped_unless_it_is_required(
    tmp_path: Path, required: str
) -> None:
    mount = tmp_path / "mount"
    mount.write_text("#!/bin/sh\necho 'mount: must be superuser to use mount.' >&2; exit 1\n")
    mount.chmod(0o755)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "sqlite"]
    done = subprocess.run(
        [*command, str(Path(__file__).parent / "crash" / "test_full_disk.py")],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYDEDUP_REQUIRE_BACKENDS": required,
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    said = " ".join(done.stdout.split())
    refused = "no disk can be mounted (mount: must be superuser to use mount.); that takes root"
    assert refused in said
    if required == "sqlite":
        assert (done.returncode, "1 skipped" in said) == (0, True)
    else:
        assert (done.returncode, "names disk, but" in said) == (1, True)
