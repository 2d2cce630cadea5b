# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: what a user is told of his rights, as where he finds no store."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

import pydedup
from pydedup import registry
from pydedup.adapters._mysql_base import MysqlBase
from pydedup.adapters._schema import TABLES, VIEWS
from pydedup.errors import MissingStoreError, NotAStoreError, ReadOnlyError, StoreError

Run = Callable[..., list[tuple[Any, ...]]]


def hint(user: Any) -> str:
    """What a user is told who finds no store, but may look for one."""
    with pytest.raises(MissingStoreError, match="holds no store") as caught:
        registry.connect(user.url, mode="r")
    return str(caught.value)


def test_the_server_is_asked_once_who_a_user_is(user: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    user.grant("SELECT")
    asked: list[str] = []
    query = MysqlBase._query

    def noted(self: MysqlBase, sql: str, *parameters: Any) -> Any:
        asked.append(sql)
        return query(self, sql, *parameters)

    monkeypatch.setattr(MysqlBase, "_query", noted)
    assert f"TO '{user.name}'@'%'" in hint(user)
    assert sum("CURRENT_USER" in sql for sql in asked) == 1


@pytest.mark.parametrize(
    ("privileges", "where", "may"),
    [
        ("CREATE", "*", True),
        ("ALL", "`{name}`", True),
        ("INSERT, CREATE, DROP", "`{name}`", True),
        ("CREATE", "`{stem}%`", True),
        ("CREATE", "`{stem}" + 12 * "_" + "`", True),
        ("CREATE", "`{first}%`", True),
        ("CREATE VIEW, CREATE ROUTINE, DROP", "`{name}`", False),
        ("CREATE", "`{stem}`", False),
        ("CREATE", "`{first}\\_%`", False),  # an underscore and nothing else
        ("CREATE", "`{first}\\%`", False),
    ],
)
def test_who_may_create_a_store_is_not_told_to_ask(
    url: str, user: Any, run: Run, privileges: str, where: str, may: bool
) -> None:
    user.grant("SELECT")
    ((name,),) = run(url, "SELECT DATABASE()")
    place = where.format(name=name, stem=name[:-12], first=name[:3])
    run(url, f"GRANT {privileges} ON {place}.* TO {user.name}")
    assert ("may not create one" in hint(user)) == (not may)


def test_a_role_that_is_not_the_default_one_allows_nothing(
    url: str, user: Any, run: Run, of_mysql: bool
) -> None:
    role = f"{user.name}_role"
    user.grant("SELECT")
    run(
        url, f"CREATE ROLE {role}", f"GRANT CREATE ON *.* TO {role}", f"GRANT {role} TO {user.name}"
    )
    try:
        assert f"user {user.name}@% may not create one" in hint(user)
        run(url, f"SET DEFAULT ROLE {role} {'TO' if of_mysql else 'FOR'} {user.name}")
        assert "may not create one" not in hint(user)
    finally:
        run(url, f"DROP ROLE {role}")


def test_what_is_to_be_granted_can_be_run_as_it_is_told(url: str, user: Any, run: Run) -> None:
    ((name,),) = run(url, "SELECT CONCAT(DATABASE(), '`b_c')")
    quoted = name.replace("`", "``")
    run(url, f"CREATE DATABASE `{quoted}`", f"GRANT SELECT ON `{quoted}`.* TO {user.name}")
    try:
        user._url = urlsplit(url)._replace(path=f"/{quote(name)}").geturl()
        told = hint(user)
        assert "may not create one: connect as one who may, or" in told
        run(url, told[told.index("GRANT") :].partition(", then")[0])
        assert "GRANT" not in hint(user)
        pydedup.open(user.url).close()
    finally:
        run(url, f"DROP DATABASE `{quoted}`")


def test_a_table_that_may_not_be_read_is_named(url: str, user: Any, run: Run) -> None:
    """The server lists no such table: it was called one of somebody else's, which it is not."""
    pydedup.open(url).close()
    ((name,),) = run(url, "SELECT DATABASE()")
    for missing in ("meta", "tensors"):
        others = [table for table in TABLES if table != missing]
        for table in others:
            run(url, f"GRANT SELECT ON {name}.pydedup_{table} TO {user.name}")
        denied = f"SELECT command denied to user .*pydedup_{missing}.*; grant it"
        with pytest.raises(StoreError, match=denied):
            pydedup.open(user.url)
        for table in others:
            run(url, f"REVOKE ALL ON {name}.pydedup_{table} FROM {user.name}")
    run(url, f"GRANT SELECT ON {name}.* TO {user.name}", "DROP TABLE pydedup_tensors")
    with pytest.raises(NotAStoreError, match=r"no whole store: its table .*pydedup_tensors"):
        pydedup.open(user.url)


def test_who_may_see_nothing_is_told_that_there_may_be_a_store(
    url: str, user: Any, run: Run
) -> None:
    pydedup.open(url).close()
    ((name,),) = run(url, "SELECT DATABASE()")
    run(url, "CREATE TABLE other (n INT)", f"GRANT SELECT ON {name}.other TO {user.name}")
    with pytest.raises(MissingStoreError, match="no store that this user may read; if") as caught:
        registry.connect(user.url, mode="r")
    told = str(caught.value)
    run(url, told[told.index("GRANT SELECT") :].partition("; if not")[0])
    pydedup.open(user.url).close()


def test_a_reader_whose_name_is_in_capitals_only_reads(url: str, user: Any, run: Run) -> None:
    """A refused INSERT was taken for a refused SELECT, and the store for one to be written to."""
    pydedup.open(url).close()
    user.grant("SELECT")
    plain, user.name = user.name, f"SELECT{user.name}"
    run(url, f"RENAME USER {plain} TO {user.name}")
    try:
        with pydedup.open(user.url) as store:
            assert store.read_only
        adapter: Any = registry.connect(user.url, mode="a")
        with contextlib.closing(adapter):
            for change in ("DELETE FROM pydedup_jobs", "ALTER TABLE pydedup_jobs ADD x INT"):
                with pytest.raises(ReadOnlyError, match=r"denied to user 'SELECT.*grant it"):
                    adapter._query(change)
    finally:
        run(url, f"RENAME USER {user.name} TO {plain}")
        user.name = plain


def test_views_outlast_who_created_the_store(url: str, user: Any, run: Run) -> None:
    """They read with the rights of who asks, and not with those of somebody who may be gone."""
    user.grant("ALL")
    pydedup.open(user.url).close()
    run(url, f"DROP USER {user.name}", f"CREATE USER {user.name}")
    adapter = registry.connect(url, mode="r")
    try:
        assert [adapter.view(name) for name in VIEWS] == [[] for _ in VIEWS]
    finally:
        adapter.close()
