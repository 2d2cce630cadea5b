# SPDX-License-Identifier: Apache-2.0
"""A store whose pages are on two servers of MariaDB, by the engine Spider."""

from __future__ import annotations

from typing import Any

import numpy as np

import pydedup
from pydedup import policies
from pydedup.testing.mysql_servers import MysqlServer

POLICY = policies.Exact()


def spread(run: Any, servers: list[MysqlServer]) -> str:
    """Make an empty store on the first server whose pages are on the others; return its URL."""
    home, *others = servers
    pydedup.open(home.url).close()
    ((_, table),) = run(home.url, "SHOW CREATE TABLE pydedup_pages")
    partitions = []
    for number, other in enumerate(others, 1):
        run(other.url, table)
        run(other.url, "CREATE USER IF NOT EXISTS spider@localhost IDENTIFIED BY 'secret'")
        run(other.url, "GRANT ALL ON pydedup.* TO spider@localhost")
        socket = other.url.partition("unix_socket=")[2].replace("%2F", "/")
        run(
            home.url,
            f"CREATE SERVER pages_{number} FOREIGN DATA WRAPPER mysql OPTIONS (SOCKET '{socket}', "
            "HOST 'localhost', DATABASE 'pydedup', USER 'spider', PASSWORD 'secret')",
        )
        partitions.append(f"PARTITION p{number} COMMENT = 'srv \"pages_{number}\"'")
    run(home.url, "DROP TABLE pydedup_pages")
    definition = table[: table.rindex(")") + 1].replace("`pydedup_pages`", "`pydedup_pages`")
    run(
        home.url,
        f'{definition} ENGINE=SPIDER COMMENT=\'wrapper "mysql", table "pydedup_pages"\' '
        f"PARTITION BY KEY (id) ({', '.join(partitions)})",
    )
    return home.url


def test_a_store_over_spider(spider: list[MysqlServer], run: Any) -> None:
    url = spread(run, spider)
    weights = np.random.default_rng(1).standard_normal((1024, 2000)).astype(np.float32)
    changed = weights.copy()
    changed[:64] += 1
    with pydedup.open(url) as store:
        store.add("a@1", {"w": weights}, policy=POLICY)
        store.add("a@2", {"w": changed}, policy=POLICY)
        counts = [
            run(other.url, "SELECT COUNT(*) FROM pydedup_pages")[0][0] for other in spider[1:]
        ]
        assert min(counts) > 0
        assert store.load("a@1")["w"].tobytes() == weights.tobytes()
        assert store.load("a@2")["w"].tobytes() == changed.tobytes()
        assert store.verify().errors == []
        store.remove("a@1")
        store.vacuum()
        assert store.load("a@2")["w"].tobytes() == changed.tobytes()
        assert store.verify().errors == []
