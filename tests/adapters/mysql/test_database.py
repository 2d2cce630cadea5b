# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: how tables are made, and who may do what."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import pytest

import pydedup
from pydedup import registry
from pydedup.adapter import SCHEMA_VERSION, Adapter
from pydedup.adapters._schema import TABLES, VIEWS
from pydedup.cli.app import main
from pydedup.errors import (
    ArgumentError,
    ConflictError,
    CorruptStoreError,
    MissingStoreError,
    NotAStoreError,
    ReadOnlyError,
    StoreError,
)
from pydedup.testing._contract_base import (
    add_pages,
    add_random_pages,
    model_row,
    open_store,
    with_option,
)
from pydedup.testing.mysql_servers import mysql_connection
from pydedup.testing.servers import as_user, password_of, unused_name

MIB = 1 << 20
Run = Callable[..., list[tuple[Any, ...]]]


# ---- who may do what ----------------------------------------------------------------------------


def test_a_reader_needs_no_more_than_select(
    adapter: Adapter, url: str, user: Any, run: Run
) -> None:
    ids = add_pages(adapter, 3, size=MIB)
    user.grant("SELECT")
    reader = registry.connect(user.url, mode="r")
    try:
        assert len(list(reader.read_pages(ids))) == 3
        assert reader.view("model_sizes") == []
        assert reader.integrity_errors() == []
        # Without the privilege to look at files it is what the pages take, at least.
        assert reader.stored_bytes() >= 3 * MIB
    finally:
        reader.close()
    with pydedup.open(user.url) as store:
        assert store.read_only
        with pytest.raises(ReadOnlyError, match="this user may not write"):
            store.add("m", {"w": np.ones(4, np.float32)})
        with pytest.raises(ReadOnlyError, match="this user may not write"):
            store.quotas.set("tenant", None, 1)
    user.grant("SELECT, INSERT, UPDATE, DELETE")
    writer = registry.connect(user.url, mode="a")
    try:
        writer.create_schema({})
        add_pages(writer, 1)
        with writer.transaction():
            writer.delete_pages(ids)
            writer.bump_epoch()
    finally:
        writer.close()


def test_who_may_not_read_is_told_so_in_any_language(
    adapter: Adapter, url: str, user: Any, run: Run
) -> None:
    """The command is not the first word in French, and it was taken for one that writes."""
    user.grant("INSERT")
    (before,) = run(url, "SELECT @@GLOBAL.lc_messages")[0]
    run(url, "SET GLOBAL lc_messages = 'fr_FR'")
    try:
        with pytest.raises(StoreError, match=r"La commande 'SELECT'.*grant it") as told:
            registry.connect(user.url, mode="a").epoch()
        assert not isinstance(told.value, ReadOnlyError)
    finally:
        run(url, f"SET GLOBAL lc_messages = '{before}'")


def test_a_reader_is_told_a_size_that_is_not_stale(
    adapter: Adapter, url: str, user: Any, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """InnoDB's statistics, which is all that a reader sees, were those of empty tables."""
    run(url, "ALTER TABLE pydedup_pages STATS_AUTO_RECALC = 0", "ANALYZE TABLE pydedup_pages")
    payloads = add_random_pages(adapter, 8)
    with adapter.transaction():
        adapter.set_page_state(list(payloads)[:2], "retired", 1.0)
    user.grant("SELECT")
    estimate = "SELECT data_length FROM information_schema.tables WHERE table_name LIKE '%pages' "
    estimate += "AND table_schema = DATABASE() ORDER BY data_length DESC LIMIT 1"
    assert run(url, estimate)[0][0] < MIB
    others = "SELECT CAST(SUM(data_length + index_length) AS SIGNED) "
    others += "FROM information_schema.tables "
    others += "WHERE table_schema = DATABASE() AND table_name <> 'pydedup_pages'"
    least = 8 * MIB + run(url, others)[0][0]
    assert adapter.size_is_exact()
    for privileges, exact in (("SELECT", False), ("PROCESS", True)):
        scope = "*.*" if exact else f"{urlsplit(url).path.strip('/')}.*"
        run(url, f"GRANT {privileges} ON {scope} TO {user.name}")
        reader = registry.connect(user.url, mode="r")
        try:
            assert reader.size_is_exact() == exact
            assert least <= reader.stored_bytes() <= adapter.stored_bytes()
            assert not exact or reader.stored_bytes() == adapter.stored_bytes()
        finally:
            reader.close()
        for command in ("stats", "ls", "vacuum"):
            options = ["--dry-run"] if command == "vacuum" else []
            assert main([command, user.url, *options]) == 0
            said = capsys.readouterr().out
            if command != "ls":  # which has nothing to say of a store without models
                assert ("at least 8." in said) != exact, said
                assert ("-> about " in said and "about at" not in said) == (command == "vacuum")
        assert main(["stats", user.url, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["stored_bytes_exact"] == exact
        assert document["stored_bytes"] >= document["page_bytes"] > 0


def test_a_creator_needs_no_more_than_is_documented(url: str, user: Any, run: Run) -> None:
    name = user.name
    user.grant("CREATE, CREATE VIEW, DROP, INDEX, SELECT, INSERT, UPDATE, DELETE")
    creator = registry.connect(user.url, mode="a")
    try:
        creator.create_schema({})
        run(url, "DELETE FROM pydedup_meta")  # as if it had been cut short
        creator.create_schema({})
        assert creator.view("sharing") == []
    finally:
        creator.close()
    # Views are read with the rights of who reads, so they outlive their creator.
    run(url, f"RENAME USER {name} TO {name}_x", f"CREATE USER {name} IDENTIFIED BY 'x'")
    try:
        user.grant("SELECT")
        run(url, f"DROP USER {name}_x")
        assert run(url, "SELECT COUNT(*) FROM pydedup_sharing") == [(0,)]
    finally:
        run(url, f"DROP USER IF EXISTS {name}_x")


def test_the_server_refuses_what_a_reader_would_change(adapter: Adapter, url: str) -> None:
    reader = registry.connect(url, mode="r")
    try:
        with pytest.raises(ReadOnlyError):
            reader._define("DELETE FROM pydedup_meta")  # type: ignore[attr-defined]
        assert reader.epoch() == 0
    finally:
        reader.close()


@pytest.mark.parametrize("setting", ["read_only", "tx_read_only"])
def test_a_server_that_is_read_only(
    adapter: Adapter, url: str, user: Any, run: Run, setting: str, of_mysql: bool
) -> None:
    if of_mysql and setting == "tx_read_only":
        setting = "transaction_read_only"
    user.grant("ALL")
    writer = registry.connect(user.url, mode="a")
    run(url, f"SET GLOBAL {setting} = 1")
    try:
        with ThreadPoolExecutor(1) as thread:  # whose connection is new
            refused = thread.submit(_bump_epoch, writer).exception()
        assert isinstance(refused, ReadOnlyError)
        assert "primary server" in str(refused)
        assert writer.epoch() == 0
        later = registry.connect(user.url, mode="a")
        assert later.read_only
        later.close()
        with pytest.raises(ReadOnlyError, match="primary server") as caught:
            pydedup.open(with_option(user.url, "prefix=other_"))
        assert "GRANT" not in str(caught.value)  # there was, which would have changed nothing
    finally:
        run(url, f"SET GLOBAL {setting} = 0")
    _bump_epoch(writer)
    writer.close()


def _bump_epoch(adapter: Adapter) -> None:
    with adapter.transaction():
        adapter.bump_epoch()


# ---- tables -------------------------------------------------------------------------------------


def test_tables_are_innodb_and_names_are_bytes(adapter: Adapter, url: str, run: Run) -> None:
    made = run(
        url,
        "SELECT DISTINCT CAST(engine AS CHAR), table_collation FROM information_schema.tables "
        "WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE'",
    )
    assert made == [("InnoDB", "utf8mb4_bin")]
    with adapter.transaction():
        ids = [adapter.insert_model(model_row(name)) for name in ("\xe9", "e", "E", "e ")]
    assert [row.name for row in adapter.models(state=None)] == ["\xe9", "e", "E", "e "]
    assert [row.id for row in adapter.models(name="e", state=None)] == ids[1:2]


def test_a_creation_that_was_cut_short_is_begun_again(adapter: Adapter, url: str, run: Run) -> None:
    run(url, "DELETE FROM pydedup_meta", "DROP TABLE pydedup_jobs", "DROP VIEW pydedup_sharing")
    assert adapter.schema_version() is None
    adapter.create_schema({"x": "y"})
    assert adapter.schema_version() == SCHEMA_VERSION
    assert adapter.meta()["x"] == "y"
    add_pages(adapter, 1)
    run(url, "DELETE FROM pydedup_meta")  # with something in it, it was no creation
    with pytest.raises(NotAStoreError, match="pydedup_meta"):
        adapter.schema_version()
    assert adapter.count_blocks() == 2


def test_a_creation_that_is_cut_short_anywhere_is_begun_again(
    adapter: Adapter, run: Run, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was cut while it dropped what another had left could not be begun again."""
    run(url, "DELETE FROM pydedup_meta")
    kind = type(adapter)
    define = kind._define  # type: ignore[attr-defined]
    for most in range(len(TABLES) + len(VIEWS)):
        done: list[str] = []

        def cut(self: Any, statement: str, most: int = most, done: list[str] = done) -> None:
            if len(done) == most:
                raise KeyboardInterrupt
            define(self, statement)
            done.append(statement)

        monkeypatch.setattr(kind, "_define", cut)
        with pytest.raises(KeyboardInterrupt):
            adapter.create_schema({})
        assert adapter.schema_version() is None
    monkeypatch.undo()
    adapter.create_schema({})
    assert adapter.schema_version() == SCHEMA_VERSION


def test_who_creates_waits_for_another_and_makes_nothing_beside_it(url: str, run: Run) -> None:
    """Who did would drop the other's tables, taking them for those of a creation cut short."""
    with mysql_connection(url) as other, other.cursor() as cursor:
        cursor.execute("SELECT GET_LOCK(CONCAT('pydedup:', LEFT(SHA2(DATABASE(), 256), 32)), 0)")
        assert cursor.fetchall() == [(1,)]
        with pytest.raises(ConflictError, match="somebody else has been creating"):
            pydedup.open(with_option(url, "timeout=1"))
        assert run(url, "SHOW TABLES") == []
    pydedup.open(url).close()


def test_tables_of_others_are_left_alone(url: str, run: Run) -> None:
    run(url, "CREATE TABLE pydedup_meta (a INT)", "CREATE TABLE theirs (a INT)")
    adapter = registry.connect(url, mode="a")
    try:
        with pytest.raises(NotAStoreError, match="pydedup_meta"):
            adapter.create_schema({})
    finally:
        adapter.close()
    assert run(url, "SHOW TABLES") == [("pydedup_meta",), ("theirs",)]


def test_a_table_that_is_gone_is_complained_of(adapter: Adapter, url: str, run: Run) -> None:
    run(url, "DROP TABLE pydedup_signatures")
    found = adapter.integrity_errors()
    assert found
    assert all("pydedup_signatures" in complaint for complaint in found)


def test_tables_are_checked_beside_a_transaction_that_goes_on(adapter: Adapter) -> None:
    """What checks them commits."""
    with contextlib.suppress(KeyboardInterrupt), adapter.transaction():
        adapter.put_job("j", "", "", "")
        assert adapter.integrity_errors() == []
        raise KeyboardInterrupt
    assert adapter.jobs() == []


def test_a_table_that_is_locked_is_not_taken_for_damaged(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CHECK TABLE waits for it as long as it may, and says so like damage."""
    adapter = open_store(with_option(url, "timeout=1"))
    with mysql_connection(url) as other, other.cursor() as cursor:
        cursor.execute("LOCK TABLES pydedup_signatures WRITE")
        with pytest.raises(ConflictError, match="another writer"):
            adapter.integrity_errors()
        real = adapter._checked  # type: ignore[attr-defined]

        def unlocked_afterwards(tables: Iterable[str]) -> dict[str, list[str]]:
            found: dict[str, list[str]] = real(tables)
            cursor.execute("UNLOCK TABLES")
            return found

        monkeypatch.setattr(adapter, "_checked", unlocked_afterwards)
        assert adapter.integrity_errors() == []
    adapter.close()


def test_a_payload_that_is_null_is_damage(adapter: Adapter, url: str, run: Run) -> None:
    """Somebody took the NOT NULL away."""
    ids = add_pages(adapter, 2)
    run(url, "ALTER TABLE pydedup_pages MODIFY payload LONGBLOB")
    run(url, "UPDATE pydedup_pages SET payload = NULL ORDER BY id LIMIT 1")
    with pytest.raises(CorruptStoreError, match=r"column payload of .* has NULL where bytes"):
        list(adapter.read_pages(ids))
    assert [page_id for page_id, _ in adapter.read_pages(ids[1:])] == ids[1:]


# ---- beside each other --------------------------------------------------------------------------


def test_stores_of_several_prefixes_share_a_database_and_nothing_else(url: str, run: Run) -> None:
    run(url, "CREATE TABLE acme (id INTEGER PRIMARY KEY)")  # a user's
    urls = [url, with_option(url, "prefix=acme_"), with_option(url, "prefix=acme_b_")]
    for number, one in enumerate(urls):
        assert registry.connect(one, mode="a").schema_version() is None
        with pydedup.open(one) as store:
            store.add("m", {"w": np.full((70, 70), number, np.float32)})
    for number, one in enumerate(urls):
        with pydedup.open(one) as store:
            assert [info.address for info in store.models()] == ["m@1"]
            assert (store.load("m")["w"] == number).all()
            store.remove("m")
            store.vacuum()
            assert store.verify().errors == []
    names = {name for (name,) in run(url, "SHOW TABLES")}
    assert {"acme", "acme_pages", "acme_b_pages", "pydedup_pages", "acme_sharing"} <= names


def test_a_prefix_is_in_what_is_told(url: str) -> None:
    place = with_option(url, "prefix=acme_")
    with pytest.raises(MissingStoreError, match="prefix=acme_"):
        pydedup.open(place, mode="r")


@pytest.mark.parametrize("prefix", ["", "Acme_", "1a", "a-b", "a`; DROP TABLE x", "a" * 21, "ä_"])
def test_a_prefix_is_a_short_name_in_lower_case(url: str, prefix: str) -> None:
    with pytest.raises(ArgumentError, match="prefix must be 1 to 20 lower-case letters"):
        pydedup.open(with_option(url, f"prefix={quote(prefix)}"))


def test_names_of_all_kinds(mysql_url: str, run: Run) -> None:
    name = f"{unused_name()}-naïve`"
    database, user = f"`{name.replace('`', '``')}`", "'o''brien'@'localhost'"
    url = urlsplit(mysql_url)._replace(path=f"/{quote(name)}").geturl()
    theirs = as_user(url, "o%27brien")
    run(mysql_url, f"CREATE DATABASE {database}")
    run(mysql_url, f"CREATE USER {user} IDENTIFIED BY '{password_of(mysql_url)}'")
    try:
        run(mysql_url, f"GRANT SELECT ON {database}.* TO {user}")
        with pytest.raises(ReadOnlyError) as told:
            pydedup.open(theirs)
        run(mysql_url, str(told.value).rpartition(" run ")[2])
        with pydedup.open(theirs) as store:
            store.add("m", {"w": np.ones(9, np.float32)})
        with pydedup.open(url) as store:
            assert store.stats().stored_bytes_exact
    finally:
        run(mysql_url, f"DROP USER {user}", f"DROP DATABASE {database}")


@pytest.mark.parametrize("limit", [0, 2])
def test_settings_of_the_server_cut_no_result_and_stop_no_write(
    url: str, run: Run, limit: int
) -> None:
    settings = {"sql_select_limit": limit, "sql_safe_updates": 1}
    settings |= {"max_join_size": 1, "completion_type": 1, "group_concat_max_len": 4}
    ((*before,),) = run(
        url, f"SELECT {', '.join(f'@@GLOBAL.{name}' for name in (*settings, 'sql_mode'))}"
    )
    settings["sql_mode"] = "''"  # values that do not fit are cut
    run(url, *(f"SET GLOBAL {name} = {value}" for name, value in settings.items()))
    try:
        with pydedup.open(url) as store:
            model = {f"t{n}": np.full(3, n, np.float32) for n in range(9)}
            for name in ("a", "b"):
                store.add(name, model)
            assert len(store.load("a")) == 9
            adapter = registry.connect(url, mode="a")
            assert [row["models"] for row in adapter.view("page_owners")] == ["a@1, b@1"]
            with pytest.raises(ArgumentError, match="does not take"), adapter.transaction():
                adapter.put_job("i" * 1021, "", "", "")
            adapter.close()
            store.remove("b")
            store.vacuum()
            assert [one.name for one in store.models()] == ["a"]
        rows = registry.connect_rows(url)
        try:
            with rows.read_rows("SELECT 1 UNION SELECT 2 UNION SELECT 3", 10) as stream:
                assert [row for batch in stream for row in batch] == [(1,), (2,), (3,)]
        finally:
            rows.close()
    finally:
        pairs = zip(settings, before, strict=True)
        run(url, *(f"SET GLOBAL {name} = {value!r}" for name, value in pairs))
