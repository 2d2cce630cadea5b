# SPDX-License-Identifier: Apache-2.0
"""A bit that flips in a file of the database, while nobody looks, and not only in what it returns.

PostgreSQL notices with a checksum of its own and refuses to read the page, or to delete it; MariaDB
returns a part of it; SQLite returns it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.blocks import BlockMap
from pydedup.errors import CorruptStoreError
from pydedup.testing.servers import MariadbServer, PostgresServer

#: Bytes of a page that are looked for in the files, from where on, and how far on next.
SOUGHT, FIRST, STEP = 100, 300_000, 5000


@dataclass(frozen=True)
class Place:
    """A store whose files can be changed while its database sleeps."""

    url: str
    files: Callable[[], Iterator[Path]]
    sleep: Callable[[], None]
    wake: Callable[[], None]


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "sqlite":
        path = tmp_path / "store.db"
        return Place(f"sqlite:///{path}", lambda: iter([path]), lambda: None, lambda: None)
    if request.param == "postgres":
        postgres: PostgresServer = request.getfixturevalue("own_postgres")
        return Place(
            postgres.new_place(),
            lambda: (path for path in (postgres.folder / "base").rglob("*") if path.is_file()),
            lambda: postgres._control("stop", "-m", "fast"),
            postgres.start,
        )
    mysql: MariadbServer = request.getfixturevalue("own_mysql")
    url = mysql.new_place()
    name = url.partition("?")[0].rpartition("/")[2]
    return Place(url, lambda: (mysql.folder / name).glob("*.ibd"), mysql.stop, mysql.start)


def flip_on_disk(place: Place, payload: bytes) -> None:
    """Flip a bit of a page in the file that it is in."""
    place.sleep()
    try:
        for path in place.files():
            content = path.read_bytes()
            for start in range(FIRST, len(payload), STEP):
                at = content.find(payload[start : start + SOUGHT])
                if at >= 0:
                    with path.open("r+b") as file:
                        file.seek(at)
                        file.write(bytes([content[at] ^ 1]))
                    return
        raise AssertionError("the page is in no file")
    finally:
        place.wake()


def test_a_bit_that_flips_on_disk(place: Place, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    models = {name: {"w": rng.standard_normal((600, 200))} for name in ("mine", "theirs")}
    healthy = f"sqlite:///{tmp_path}/healthy.db"
    for url in (healthy, place.url):
        with pydedup.open(url) as store:
            for name, model in models.items():
                store.add(name, model, policy=policies.Exact())
            page_id = store._adapter.model_pages(store.info("mine").info.id)[0][1]
            ((_, payload),) = store._adapter.read_pages([page_id])
    flip_on_disk(place, payload)

    with pydedup.open(place.url) as store:
        with pytest.raises(CorruptStoreError, match=f"page {page_id}: .*read by mine@1"):
            store.load("mine")
        assert np.array_equal(store.load("theirs")["w"], models["theirs"]["w"])
        assert store.verify().damaged_pages == {page_id: ["mine@1"]}
        report = store.verify(repair_from=healthy)
        assert report.ok
        assert report.repair is not None
        assert report.repair.missing == ()
        for name, model in models.items():
            assert np.array_equal(store.load(name)["w"], model["w"])
        if report.repair.undeleted_pages:
            assert report.repair.undeleted_pages == (page_id,)
            assert "postgres" in place.url
            delete_as_documented(place.url, page_id)
        store.vacuum()
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        for name, model in models.items():
            assert np.array_equal(store.load(name)["w"], model["w"])


@pytest.mark.parametrize("slot", [40, 3000])  # of other pages there are as many, or not
def test_a_block_map_that_names_a_slot_beyond_its_page(tmp_path: Path, slot: int) -> None:
    rng = np.random.default_rng(0)
    small, large = ({"w": rng.standard_normal((rows, 64))} for rows in (64, 2000))
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        store.add("large", large, policy=policies.Exact())
        store.add("small", small, policy=policies.Exact())
        store.add("other", {"w": small["w"] + 1}, policy=policies.Exact())
        old = store._catalog.model("small").block_map("w")
    slots = np.full_like(old.slots, slot)
    (part,) = BlockMap(old.grid, old.dtype, old.page_ids, slots).parts()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE pydedup_block_maps SET payload = ? WHERE model_id = 2", [part])
    both = {"w": np.concatenate([large["w"], small["w"]])}
    with pydedup.open(path) as store:
        for work in (
            lambda: store.load("small"),
            lambda: store.explain("small"),
            lambda: store.copy_to(tmp_path / "copy.db", ["small"]),
            store.vacuum,
        ):
            with pytest.raises(CorruptStoreError, match=f"slot {slot} .*run verify"):
                work()
        assert not store.verify().ok
        with contextlib.suppress(CorruptStoreError):
            store.add("small", both)  # looks at the version before
        assert np.array_equal(store.load("large")["w"], large["w"])


def test_a_block_map_that_names_the_same_bytes_of_another_type(tmp_path: Path) -> None:
    """Hashes are of bytes, so these are those of the source."""
    path = tmp_path / "store.db"
    floats = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    with pydedup.open(path) as store:
        store.add("floats", {"w": floats}, policy=policies.Exact())
        store.add("whole", {"w": floats.view(np.int32)}, policy=policies.Exact())
        of, own = (store._catalog.model(name).block_map("w") for name in ("floats", "whole"))
    (part,) = BlockMap(own.grid, own.dtype, of.page_ids, of.slots).parts()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE pydedup_block_maps SET payload = ? WHERE model_id = 2", [part])
    with pydedup.open(path) as store:
        with pytest.raises(CorruptStoreError, match="of dtype code"):
            store.load("whole")
        assert {
            "whole@1, tensor 'w': 1 blocks on page 1 are not the source's",
            "whole@1: what it reads is recorded wrongly, of pages 1, 2",
        } <= set(store.verify().errors)


def delete_as_documented(url: str, page_id: int) -> None:
    """Run what docs/faults.md tells a superuser."""
    import psycopg

    text = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    server, _, schema = url.partition("schema=")
    with psycopg.connect(server.rstrip("?&"), autocommit=True) as connection:
        statements = [line.strip() for line in text.splitlines() if line.startswith("    ")]
        assert len(statements) == 3
        for statement in statements:
            sql = statement.replace("pydedup.", f"{schema}.").replace("= 3;", f"= {page_id};")
            connection.execute(sql)  # type: ignore[call-overload]
