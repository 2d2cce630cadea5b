# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: how tables are made, where they live, and who may do what."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup import registry
from pydedup.adapter import LIVE, RETIRED, Adapter
from pydedup.adapters._schema import TABLES
from pydedup.errors import (
    ConflictError,
    CorruptStoreError,
    NotAStoreError,
    NotFoundError,
    ReadOnlyError,
    StorageFullError,
    StoreError,
    UnavailableError,
)
from pydedup.graph import Graph, Node
from pydedup.testing._contract_base import add_pages, open_store, with_option

MIB = 1 << 20


def as_role(url: str, role: str) -> str:
    return with_option(url, f"user={role}")


# ---- how it is set up ---------------------------------------------------------------------------


def test_payloads_are_stored_apart_and_not_compressed(
    adapter: Adapter, schema: str, sql: Any
) -> None:
    columns = "SELECT c.relname, a.attstorage FROM pg_attribute a JOIN pg_class c ON c.oid = "
    columns += "a.attrelid WHERE c.relnamespace = %s::regnamespace AND a.attname = 'payload'"
    found = dict(sql(columns, schema))
    assert found == dict.fromkeys(
        ("artifacts", "block_maps", "pages", "signatures", "source_hashes"), "e"
    )
    with adapter.transaction():
        adapter.insert_pages([(bytes(16), bytes(1 << 20))], state=LIVE)  # would compress well
    assert sql(f"SELECT pg_column_size(payload) FROM {schema}.pages") == [(1 << 20,)]  # noqa: S608
    assert adapter.stored_bytes() > 1 << 20


def test_names_are_compared_by_their_bytes(adapter: Adapter, schema: str, sql: Any) -> None:
    collations = "SELECT DISTINCT l.collname FROM pg_attribute a JOIN pg_collation l ON l.oid = "
    collations += "a.attcollation JOIN pg_class c ON c.oid = a.attrelid "
    collations += "WHERE c.relnamespace = %s::regnamespace AND c.relkind = 'r' AND a.attnum > 0"
    assert sql(collations, schema) == [("C",)]


def test_a_page_is_published_without_writing_its_payload(adapter: Adapter, schema: str) -> None:
    ids = add_pages(adapter, 8, size=MIB)
    before = adapter.stored_bytes()
    for retired_at in (1.0, 2.0, 3.0):
        with adapter.transaction():
            adapter.set_page_state(ids, RETIRED, retired_at)
    assert adapter.stored_bytes() < before + (1 << 20), "8 MiB of payloads were written again"


def test_the_planner_is_told_of_many_new_blocks(adapter: Adapter, schema: str, sql: Any) -> None:
    """It took minutes to count them, and went through all blocks for a few hundred hashes."""
    table = f"{schema}.distinct_blocks"
    sql(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
    known = "SELECT reltuples FROM pg_class WHERE oid = %s::regclass"
    rng = np.random.default_rng(0)
    with pydedup.open(adapter.url) as store:
        store.add("small", {"w": rng.standard_normal((80, 80))}, block_shape=(8, 8))
        assert sql(known, table) in ([(-1,)], [(0,)]), "of no use"
        store.add("large", {"w": rng.standard_normal((800, 1200))}, block_shape=(8, 8))
        assert sql(known, table) == [(15_100,)]
        store.add("small", {"w": rng.standard_normal((80, 80))}, block_shape=(8, 8))
    assert sql(known, table) == [(15_100,)], "not for a hundred"
    hashes = ", ".join(f"'{number}'" for number in range(60))
    ((plan, *_), *_) = sql(f"EXPLAIN SELECT * FROM {table} WHERE hash128 IN ({hashes})")  # noqa: S608
    assert "Seq Scan" not in plan


def test_a_planner_that_cannot_be_told_is_no_error(
    url: str, schema: str, postgres_url: str, sql: Any
) -> None:
    """What it follows is published by then: an add failed whose model was there."""
    adapter: Any = open_store(with_option(url, "options=-c%20lock_timeout%3D100"))
    with contextlib.closing(adapter):
        (page,) = add_pages(adapter, 1)
        with adapter.transaction():
            adapter.insert_blocks(
                (number.to_bytes(16, "big"), page, number, None) for number in range(10_000)
            )
        with psycopg.connect(postgres_url) as other:
            other.execute("LOCK TABLE pg_catalog.pg_class")
            with pytest.raises(ConflictError):
                adapter.stored_bytes()
            adapter.checkpoint()
    counted = "SELECT analyze_count FROM pg_stat_user_tables WHERE relid = %s::regclass"
    assert sql(counted, f"{schema}.distinct_blocks") == [(0,)]


def test_freed_space_is_used_again(adapter: Adapter) -> None:
    add_pages(adapter, 4, size=MIB)
    sizes = []
    for _ in range(3):
        ids = add_pages(adapter, 16, size=MIB)
        sizes.append(adapter.stored_bytes())
        with adapter.transaction():
            adapter.delete_pages(ids)
        adapter.compact()
    assert max(sizes) < sizes[0] + (2 << 20), sizes
    with pytest.raises(StoreError, match="inside of a transaction"), adapter.transaction():
        adapter.compact()


def test_where_a_disk_is_full_the_pages_make_room_for_the_rest(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first table that found no room kept the pages from giving theirs."""
    real: Any = adapter
    asked: list[str] = []

    def query(sql: str, values: Any = ()) -> Any:
        asked.append(sql.replace('"', ""))
        if sql.startswith("VACUUM (ANALYZE)") and "pages" not in sql:
            raise StorageFullError("could not extend file")
        return type(real)._query(real, sql, values)

    monkeypatch.setattr(real, "_query", query)
    adapter.compact()
    tables = [sql.rpartition(".")[2] for sql in asked]
    assert tables[0] == "pages"
    told = [sql for sql in asked if "ANALYZE" not in sql]
    assert [sql.rpartition(".")[2] for sql in told] == [
        table for table in tables[: len(TABLES)] if "pages" not in table
    ]


def test_many_retired_pages_are_not_gone_through_for_every_block(
    url: str, schema: str, sql: Any
) -> None:
    """Where they do not fit into work_mem, PostgreSQL did: 1,000 hashes took minutes."""
    adapter: Any = open_store(with_option(url, "options=-c%20work_mem%3D64kB"))
    with contextlib.closing(adapter):
        live = add_pages(adapter, 2)
        hashes = [bytes([200 + number]) * 16 for number in range(4)]
        with adapter.transaction():
            adapter.insert_blocks([(key, live[0], slot, None) for slot, key in enumerate(hashes)])
            adapter.insert_blocks([(hashes[0], live[1], 0, None)])
            adapter.set_page_state(live[1:], RETIRED, 1.0)
        sql(
            f"INSERT INTO {schema}.pages (state, retired_at, checksum, payload) "  # noqa: S608
            "SELECT 'retired', 1, '', '' FROM generate_series(1, 20000)"
        )
        for table in ("pages", "distinct_blocks"):
            sql(f"ANALYZE {schema}.{table}")
        assert [row.page_id for row in adapter.find_blocks(hashes)] == live[:1] * 4
        assert adapter.count_blocks() == len(adapter.blocks_on_pages(live[:1]))
        statements = [(adapter._sql.find_blocks(1), [hashes]), (adapter._sql.count_blocks, [])]
        for statement, values in statements:
            plan = "\n".join(str(row) for row in adapter._query(f"EXPLAIN {statement}", values))
            assert "Materialize" not in plan


def test_tables_that_are_made_anew_under_a_reader_are_another_store(
    url: str, schema: str, sql: Any
) -> None:
    """What was cached of the store before was served as models of the new one."""
    old, new = (np.random.default_rng(seed).standard_normal((99, 99)) for seed in (1, 2))
    with pydedup.open(url) as store:
        store.add("m@1", {"w": old})
    with pydedup.open(url, mode="r") as reader:
        assert reader.load("m")["w"].tobytes() == old.tobytes()
        sql(f"DROP SCHEMA {schema} CASCADE")
        with pydedup.open(url) as store:
            store.add("m@1", {"w": new})
        for read in (lambda: reader.load("m"), lambda: reader.tensor("m", "w")):
            with pytest.raises(UnavailableError, match=r"is another store .* open it again"):
                read()
    with pydedup.open(url, mode="r") as reader:
        assert reader.load("m")["w"].tobytes() == new.tobytes()


def test_a_model_not_read_before_is_not_made_of_pages_of_the_store_before(
    url: str, schema: str, sql: Any
) -> None:
    """Ids of pages begin anew too, and those of before were in memory: weights were wrong."""
    rng = np.random.default_rng(0)
    with pydedup.open(url) as store:
        store.add("m@1", {"w": rng.standard_normal((3000, 400))})
        assert store.stats().pages > 2
    new = rng.standard_normal((99, 99))
    with pydedup.open(url, mode="r") as reader:
        reader.tensor("m", "w").matmul(np.ones((1, 400)))
        sql(f"DROP SCHEMA {schema} CASCADE")
        with pydedup.open(url) as store:
            store.add("first", {"w": rng.standard_normal((99, 99))})
            store.add("second", {"w": new})
        for read in (reader.load, lambda name: reader.tensor(name, "w")):
            with pytest.raises(UnavailableError, match=r"is another store .* open it again"):
                read("second")
    with pydedup.open(url, mode="r") as reader:
        assert reader.load("second")["w"].tobytes() == new.tobytes()


# ---- schemas and roles --------------------------------------------------------------------------


def test_stores_live_beside_each_other(postgres_url: str, schema: str, url: str, sql: Any) -> None:
    sql(f"CREATE SCHEMA {schema}")
    sql(f"CREATE TABLE {schema}.customers (name text)")
    first = open_store(url)
    second = registry.connect(postgres_url, mode="a", schema=f"{schema}_2")
    try:
        second.create_schema({})
        add_pages(first, 2, size=10)
        assert (len(first.page_rows()), len(second.page_rows())) == (2, 0)
        assert f"schema={schema}_2" in second.url
        assert sql(f"SELECT * FROM {schema}.customers") == []  # noqa: S608
        public = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        assert sql(public) == []
        again = registry.connect(url, mode="r", schema=schema)
        assert len(again.page_rows()) == 2
        again.close()
    finally:
        first.close()
        second.close()
        sql(f"DROP SCHEMA {schema}_2 CASCADE")


def test_tables_of_somebody_else_are_left_alone(schema: str, url: str, sql: Any) -> None:
    sql(f"CREATE SCHEMA {schema}")
    sql(f"CREATE TABLE {schema}.models (id int)")
    with pytest.raises(NotAStoreError, match="not its own"):
        open_store(url)
    tables = "SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace"
    assert sql(tables, schema) == [("models",)]


def test_a_missing_store_says_how_to_make_one(schema: str, url: str, sql: Any) -> None:
    with pytest.raises(NotAStoreError, match=f"schema={schema} holds no store in .*mode 'a'"):
        registry.connect(url, mode="r")
    assert sql("SELECT to_regnamespace(%s)::text", schema) == [(None,)]


def test_a_user_without_rights_is_told_what_to_ask_for(
    schema: str, url: str, role: str, sql: Any
) -> None:
    mine = as_role(url, role)
    for _ in range(2):  # first the schema is missing, then the right to create in it
        with pytest.raises(ReadOnlyError, match="administrator") as caught:
            open_store(mine)
        sql(str(caught.value).rpartition(": ")[2])
        if "CREATE SCHEMA" in str(caught.value):
            sql(f"ALTER SCHEMA {schema} OWNER TO CURRENT_USER")
    adapter = open_store(mine)
    assert len(adapter.page_rows(ids=add_pages(adapter, 1, size=9))) == 1
    adapter.close()


def test_what_is_to_be_granted_names_what_it_must(url: str, role: str, sql: Any) -> None:
    """Names of schemas and roles with capitals and quotes in them."""
    odd, schema = f'{role}"X', f"{role}_Big"
    place = url.replace(url.partition("schema=")[2], schema)
    sql(f'ALTER ROLE {role} RENAME TO "{role}""X"')
    try:
        mine = as_role(place, quote(odd))
        with pytest.raises(ReadOnlyError, match="administrator") as caught:
            open_store(mine)
        sql(str(caught.value).rpartition(": ")[2])
        open_store(mine).close()
        sql(f'REVOKE ALL ON SCHEMA "{schema}" FROM "{role}""X"')
        with pytest.raises(StoreError, match=f'GRANT USAGE ON SCHEMA "{schema}"'):
            open_store(mine)
    finally:
        sql(f'ALTER ROLE "{role}""X" RENAME TO {role}')


def test_a_reader_role_reads(adapter: Adapter, schema: str, url: str, role: str, sql: Any) -> None:
    ids = add_pages(adapter, 3, size=5000)
    for mode in ("a", "r"):
        with pytest.raises(StoreError, match=f'GRANT USAGE ON SCHEMA "{schema}"'):
            registry.connect(as_role(url, role), mode=mode).epoch()
    sql(f'GRANT USAGE ON SCHEMA {schema} TO "{role}"')
    sql(f'GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO "{role}"')
    for mode in ("a", "r"):
        reader = registry.connect(as_role(url, role), mode=mode)
        assert reader.read_only
        assert len(list(reader.read_pages(ids))) == 3
        assert reader.view("sharing") == []
        assert reader.integrity_errors() == []
        with pytest.raises(ReadOnlyError), reader.transaction():
            pass
        reader.close()


def test_a_writer_role_writes(adapter: Adapter, schema: str, url: str, role: str, sql: Any) -> None:
    sql(f'GRANT USAGE ON SCHEMA {schema} TO "{role}"')
    sql(f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO "{role}"')
    sql(f'GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO "{role}"')
    writer = open_store(as_role(url, role))
    ids = add_pages(writer, 2, size=10)
    with writer.transaction():
        writer.delete_pages(ids)
        assert writer.bump_epoch()
    writer.close()


def test_who_does_not_see_all_rows_writes_none(schema: str, url: str, role: str, sql: Any) -> None:
    """A removal took pages of models whose rows row-level security hid, and left its own behind."""
    with pydedup.open(url) as store:
        for name in ("a", "b"):
            store.add(name, {"w": np.full(70_000, ord(name), np.float32)})
        sql(f'GRANT USAGE ON SCHEMA {schema} TO "{role}"')
        sql(f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO "{role}"')
        sql(f"ALTER TABLE {schema}.model_pages ENABLE ROW LEVEL SECURITY")
        with pydedup.open(as_role(url, role)) as theirs:
            assert theirs.load("a")["w"][0] == ord("a")
            for change in (lambda: theirs.remove("a"), theirs.vacuum):
                with pytest.raises(ReadOnlyError, match="may not write"):
                    change()
            # Before the rows that seem to be lost.
            told = theirs.verify().errors
            assert told[0].startswith("database: row-level security may hide rows of model_pages")
            assert len(told) > 1
            sql(f"CREATE POLICY everybody ON {schema}.model_pages USING (true)")
            report = theirs.verify()  # nothing is missing, so nothing is wrong
            assert report.ok
            assert report.notes[0].startswith("database: row-level security may hide rows of")
            sql(f"ALTER TABLE {schema}.model_pages DISABLE ROW LEVEL SECURITY")
            theirs.remove("a")
        assert [model.name for model in store.models()] == ["b"]
        assert store.verify().errors == []


def test_who_sees_no_row_is_told_what_hides_them(
    schema: str, url: str, role: str, sql: Any
) -> None:
    """Its tables were said not to be pydedup's own, or the store to be empty."""
    with pydedup.open(url) as store:
        store.add("a", {"w": np.ones(3, np.float32)})
    sql(f'GRANT USAGE ON SCHEMA {schema} TO "{role}"')
    sql(f'GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO "{role}"')
    sql(f"ALTER TABLE {schema}.meta ENABLE ROW LEVEL SECURITY")
    with pytest.raises(UnavailableError, match="row-level security may hide rows of meta from"):
        pydedup.open(as_role(url, role), mode="r")
    sql(f"CREATE POLICY everybody ON {schema}.meta USING (true)")
    with pydedup.open(as_role(url, role), mode="r") as theirs:
        assert theirs.load("a")["w"][0] == 1
        sql(f"ALTER TABLE {schema}.models ENABLE ROW LEVEL SECURITY")
        with pytest.raises(NotFoundError, match="is empty; but row-level security may hide rows"):
            theirs.predict("a", [1.0])


@pytest.mark.parametrize("table", ["tensors", "block_maps", "models", "distinct_blocks"])
def test_what_seems_to_be_missing_may_be_hidden(
    schema: str, url: str, role: str, sql: Any, tmp_path: Path, table: str
) -> None:
    """Only verify said so; others told users to restore a backup."""
    with pydedup.open(url) as store:
        store.add("a", {"w": np.full(70_000, 1, np.float32)})
        sql(f'GRANT USAGE ON SCHEMA {schema} TO "{role}"')
        sql(f'GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO "{role}"')
        theirs = pydedup.open(as_role(url, role), mode="r")
        sql(f"ALTER TABLE {schema}.{table} ENABLE ROW LEVEL SECURITY")
        said = f"may hide rows of {table} from this user"
        with theirs:
            for take in (
                lambda: theirs.backup(tmp_path / "backup.db"),
                lambda: theirs.copy_to(tmp_path / "copy.db"),
            ):
                with pytest.raises(CorruptStoreError, match=said):
                    take()
            if table in ("tensors", "block_maps"):
                with pytest.raises(CorruptStoreError, match=said):
                    theirs.load("a")
            if table == "tensors":
                for look in (theirs.info, theirs.explain):
                    with pytest.raises(CorruptStoreError, match=said):
                        look("a")
            report = theirs.copy_to(tmp_path / "copy.db", skip_damaged=True)
            assert said in report.damaged[0]
            assert len(report.damaged) > 1
            sql(f"CREATE POLICY everybody ON {schema}.{table} USING (true)")
            assert theirs.copy_to(tmp_path / "copy.db", skip_damaged=True).damaged == ()
            sql(f"ALTER TABLE {schema}.{table} DISABLE ROW LEVEL SECURITY")


#: What reads rows of a table alone, of a store with "a", "a@prod" and a "b" of the same layers.
TAKES: dict[str, Callable[[pydedup.Store, Path], object]] = {
    "predict": lambda store, path: store.predict("a", np.ones(300, np.float32)),
    "load_torch": lambda store, path: store.load_torch("a"),
    "export": lambda store, path: store.export("a", path / "a.npz"),
    "warm": lambda store, path: store.warm("a"),
    "diff": lambda store, path: store.diff("a", "b"),
    "graph": lambda store, path: store.graph("a"),
    "alias": lambda store, path: store.predict("a@prod", np.ones(300, np.float32)),
    "vacuum": lambda store, path: store.vacuum(dry_run=True),
}


@pytest.mark.parametrize(
    ("table", "takes"),
    [
        ("aliases", {"alias"}),
        ("artifacts", {"graph", "predict", "export"}),
        ("block_maps", {"predict", "load_torch", "export", "diff"}),
        ("model_pages", {"vacuum"}),
        ("pages", {"predict", "load_torch", "export", "warm"}),
        ("tensors", {"predict", "load_torch", "export", "warm", "diff", "graph"}),
    ],
)
def test_whoever_reads_is_told_what_may_be_hidden(
    schema: str, url: str, role: str, sql: Any, tmp_path: Path, table: str, takes: set[str]
) -> None:
    """A prediction said that a page does not exist, or to restore a backup."""
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    with pydedup.open(url) as store:
        for name in ("a", "b"):
            store.add(name, {"w": np.full((70, 300), 0.1, np.float32)}, graph=graph)
        store.alias("a", "prod", "1")
    sql(f'GRANT USAGE ON SCHEMA {schema} TO "{role}"')
    sql(f'GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO "{role}"')
    sql(f"ALTER TABLE {schema}.{table} ENABLE ROW LEVEL SECURITY")
    said = f"row-level security may hide rows of {table} from this user"
    with pydedup.open(as_role(url, role), mode="r") as theirs:
        for take in sorted(takes):
            with pytest.raises(CorruptStoreError) as caught:
                TAKES[take](theirs, tmp_path)
            assert str(caught.value).count(said) == 1, take
        if "predict" in takes:
            requests = [("a", np.ones(300, np.float32)), ("b", np.ones(300, np.float32))]
            answers = theirs.predict_many(requests)
            assert [str(answer).count(said) for answer in answers] == [1, 1]
        if table in ("block_maps", "tensors"):
            for damaged in (theirs.stats(by="tenant").damaged, theirs.report().damaged):
                assert damaged[0].startswith(said)
                assert len(damaged) > 1
        if table == "aliases":
            with pytest.raises(NotFoundError, match=said):
                theirs.predict("a@other", np.ones(300, np.float32))


def test_reading_alone_is_held_by_the_server_too(adapter: Adapter, url: str) -> None:
    reader = registry.connect(url, mode="r")
    with pytest.raises(ReadOnlyError, match="read-only"):
        reader._query("CREATE TABLE x (y int)")  # type: ignore[attr-defined]
    reader.close()
