# SPDX-License-Identifier: Apache-2.0
"""docs/sql.md and the scripts of docs/roles say what is so, on each back end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup import policies, registry
from pydedup.errors import PydedupError, ReadOnlyError, StoreError
from pydedup.testing._contract_base import with_option
from pydedup.testing.servers import as_user, password_of

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "sql.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```sql\n(.*?);\n```", TEXT, re.DOTALL)
MODELS = ("base@1", "tuned@1", "other@1")


def family() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((4000, 100)).astype(np.float32)
    tuned = base.copy()
    tuned[:1000] += 1
    return {
        "base@1": {"w": base},
        "tuned@1": {"w": tuned},
        "other@1": {"w": rng.standard_normal((2000, 100)).astype(np.float32)},
    }


def fill(url: str) -> None:
    with pydedup.open(url) as store:
        for address, model in family().items():
            store.add(address, model, policy=policies.Exact())


def rows(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement of the documentation on the store's own database."""
    adapter = registry.connect(url, mode="a")
    dialect = adapter._sql.dialect  # type: ignore[attr-defined]
    statement = statement.replace("pydedup.", f"{dialect.qualifier}{dialect.prefix}")
    try:
        if not statement.startswith("SELECT"):
            with adapter.transaction():
                adapter._write(statement)  # type: ignore[attr-defined]
            return []
        found = adapter._query(statement.replace("%", "%%"))  # type: ignore[attr-defined]
        return [tuple(plain(value) for value in row) for row in found]
    finally:
        adapter.close()


def plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode()
    return value if isinstance(value, str) else int(value)


def test_examples_of_sql_run_as_they_stand(store_url: str) -> None:
    fill(store_url)
    place = "pydedup." if store_url.startswith("postgres") else ""
    rows(store_url, f"CREATE TABLE {place}deployments (host TEXT, model TEXT, version TEXT)")
    for host, model in (("a", "base"), ("a", "tuned"), ("b", "other")):
        values = f"('{host}', '{model}', '1')"
        rows(store_url, f"INSERT INTO {place}deployments VALUES {values}")  # noqa: S608
    found = [
        rows(store_url, example.replace("FROM deployments", f"FROM {place}deployments"))
        for example in EXAMPLES
    ]
    assert len(found) == 6
    by_model, by_name, strangers, nearest, by_owners, by_host = found
    with pydedup.open(store_url) as store:
        addresses = {info.address for info in store.models()}
        pages = store.stats().pages
    assert {(row[0], row[1]): row[2] for row in by_model} == {
        ("base", "1"): 1_600_000,
        ("tuned", "1"): 1_600_000,
        ("other", "1"): 800_000,
    }
    assert {f"{row[0]}@{row[1]}" for row in by_model} == addresses
    assert {row[0]: row[1] for row in by_name} == {"base": 1, "tuned": 1, "other": 1}
    assert strangers == [("other", "1")]
    assert [row[:2] for row in nearest] == [("tuned", "1")]
    assert 0 < nearest[0][2] < 1_600_000
    # Of a pair the view has one row, with either of the two in front.
    of_tuned = rows(store_url, EXAMPLES[3].replace("'base'", "'tuned'"))
    assert of_tuned == [("base", "1", nearest[0][2])]
    assert sum(row[1] for row in by_owners) == pages
    assert [row[0] for row in by_owners] == [2, 1]
    bytes_of = {row[0]: row[3] for row in by_model}
    assert dict(by_host) == {"a": bytes_of["base"] + bytes_of["tuned"], "b": bytes_of["other"]}


def test_columns_of_views_are_documented(store_url: str) -> None:
    fill(store_url)
    for view in ("model_sizes", "sharing", "page_owners"):
        section = TEXT[TEXT.index(f"`{view}`: one row") :]
        section = section[: re.search(r"\n\n`|\n## ", section).start()]  # type: ignore[union-attr]
        first_cells = "".join(re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE))
        adapter = registry.connect(store_url, mode="r")
        (row, *_) = adapter.view(view)
        adapter.close()
        assert re.findall(r"`(\w+)`", first_cells) == list(row)


def test_sharing_in_python_is_the_view(store_url: str) -> None:
    rng = np.random.default_rng(0)
    shared = [rng.standard_normal((500, 600), dtype=np.float32) for _ in range(4)]
    with pydedup.open(store_url) as store:
        assert store.sharing() == []
        store.add("none", {"w": np.zeros((0, 3), np.float32)})
        for number, name in enumerate(["z", "ä", "Z", "z", "a-b", "gone", "Z", "\U0001f600", "ä"]):
            own = {"own": rng.standard_normal((50, 50), dtype=np.float32)}
            kept = {f"t{i}": shared[(number + i) % 4] for i in range(2)}
            store.add(f"{name}@{number}", own | kept)
        store.remove("gone")
        found = [tuple(row.values()) for row in store.sharing()]
    view = rows(store_url, "SELECT * FROM pydedup.sharing ORDER BY 1, 2, 3, 4")
    assert [tuple(map(str, row)) for row in found] == [tuple(map(str, row)) for row in view]
    assert len({row[4] for row in found}) > 1


def test_a_view_that_was_dropped_is_seen_by_verify(store_url: str) -> None:
    """Nothing of ours reads it, and so nothing said that the SQL of others would fail."""
    fill(store_url)
    with pydedup.open(store_url, mode="r") as store:
        assert store.verify().errors == []
    rows(store_url, "DROP VIEW pydedup.sharing")
    with pydedup.open(store_url, mode="r") as store:
        (complaint,) = store.verify().errors
        assert len(store.models()) == 3
    assert re.match(r"database: the view .*sharing.* is missing", complaint)


# ---- roles --------------------------------------------------------------------------------------

#: Role -> the URL of somebody who has it and nothing more.
Urls = dict[str, str]
ROLES = ("owner", "writer", "reader")


@pytest.fixture
def postgres_roles(postgres_url: str, postgres_schema: str) -> Iterator[Urls]:
    name = postgres_schema
    script = (DOCS / "roles" / "postgresql.sql").read_text().replace("pydedup", name)
    urls = {"owner": f"{name}_owner", "writer": f"{name}_w", "reader": f"{name}_r"}
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(script)
        for role in ("writer", "reader"):
            connection.execute(f"CREATE ROLE {urls[role]} LOGIN IN ROLE {name}_{role}")
        for user in urls.values():
            connection.execute(f"ALTER ROLE {user} PASSWORD '{password_of(postgres_url)}'")
        yield {
            role: with_option(as_user(postgres_url, user), f"schema={name}")
            for role, user in urls.items()
        }
        users = [*urls.values(), f"{name}_writer", f"{name}_reader"]
        connection.execute(f"DROP SCHEMA {name} CASCADE")
        for user in users:
            connection.execute(f"DROP OWNED BY {user} CASCADE")
            connection.execute(f"DROP ROLE {user}")


@pytest.fixture
def mysql_roles(
    mysql_database: str, mysql_run: Callable[..., object], of_mysql: bool
) -> Iterator[Urls]:
    parts = urlsplit(mysql_database)
    name = parts.path.strip("/")
    script = (DOCS / "roles" / "mysql.sql").read_text().replace("pydedup", name)
    statements = re.sub(r"^--.*\n", "", script, flags=re.MULTILINE).split(";\n")
    mysql_run(mysql_database, *(statement for statement in statements if statement.strip()))
    for role in ROLES:
        mysql_run(
            mysql_database,
            f"CREATE USER {name}_{role[0]}x IDENTIFIED BY 'pw'",
            f"GRANT {name}_{role} TO {name}_{role[0]}x",
            f"SET DEFAULT ROLE {name}_{role} {'TO' if of_mysql else 'FOR'} {name}_{role[0]}x",
        )
    host = parts.netloc.rpartition("@")[2]
    yield {role: parts._replace(netloc=f"{name}_{role[0]}x:pw@{host}").geturl() for role in ROLES}
    for role in ROLES:
        mysql_run(mysql_database, f"DROP USER {name}_{role[0]}x", f"DROP ROLE {name}_{role}")


@pytest.mark.parametrize("back_end", ["postgres", "mysql"])
def test_roles_may_do_what_they_must_and_no_more(
    back_end: str, request: pytest.FixtureRequest
) -> None:
    urls: Urls = request.getfixturevalue(f"{back_end}_roles")
    model = family()["base@1"]
    for role in ("writer", "reader"):
        with pytest.raises(StoreError):
            pydedup.open(urls[role])
    fill(urls["owner"])

    with pydedup.open(urls["reader"], mode="r") as store:
        assert np.array_equal(store.load("base")["w"], model["w"])
        assert np.array_equal(store.tensor("base", "w").take(np.array([7])), model["w"][[7]])
        assert len(store.sharing()) == 1
        assert store.stats().models == 3
        assert store.verify().ok
    with pytest.raises(ReadOnlyError), pydedup.open(urls["reader"]) as store:
        store.add("new", model)
    assert {(row[0], row[1]) for row in rows(urls["reader"], EXAMPLES[0])} == {
        tuple(address.split("@")) for address in MODELS
    }

    with pydedup.open(urls["writer"]) as store:
        store.add("new@1", {"w": model["w"] * 2})
        store.alias("new", "prod", "1")
        store.remove("other@1")
        store.vacuum()
        assert store.verify().ok
        assert {info.name for info in store.models()} == {"base", "tuned", "new"}

    for role in ("writer", "reader"):
        with pytest.raises(PydedupError):
            rows(urls[role], "DROP TABLE pydedup.jobs")
    with pytest.raises(PydedupError):
        rows(urls["reader"], "DELETE FROM pydedup.models")
    with pydedup.open(urls["owner"]) as store:
        assert len(store.models()) == 3
