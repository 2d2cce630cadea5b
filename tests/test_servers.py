# SPDX-License-Identifier: Apache-2.0
"""The private database servers of conftest.py: they run, and carry bytes unchanged.

They are the ground that the adapters' tests stand on; what an adapter does is tested elsewhere.
"""

from __future__ import annotations

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
