# SPDX-License-Identifier: Apache-2.0
"""A store read from within the server, by a module ``plpy`` that is played on a connection.

PL/Python itself, which is not everywhere, is in tests/scoring/test_plpython.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg
import pytest

from pydedup import registry
from pydedup.adapter import Adapter
from pydedup.errors import NotAStoreError, ReadOnlyError, StoreError
from pydedup.testing._contract_base import add_random_pages, in_thread, model_row, tensor_row


class Result(list[Mapping[str, object]]):
    """Rows of PL/Python, which are mappings."""

    def __init__(self, cursor: psycopg.Cursor[Any]) -> None:
        self.columns = [column.name for column in cursor.description or ()]
        super().__init__(dict(zip(self.columns, row, strict=True)) for row in cursor)

    def colnames(self) -> list[str]:
        return self.columns


class Plpy:
    """The module, as much of it as there is need of; statements are those of its transaction."""

    class Error(Exception):
        def __init__(self, cause: psycopg.Error) -> None:
            super().__init__(str(cause))
            self.sqlstate = cause.sqlstate

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self.prepared: list[tuple[str, list[str]]] = []
        self.executed: list[str] = []

    def prepare(self, sql: str, types: Sequence[str]) -> tuple[str, Sequence[str]]:
        assert (sql, [*types]) not in self.prepared
        self.prepared.append((sql, [*types]))
        return sql, types

    def execute(self, plan: Any, values: Sequence[object] = ()) -> Result:
        sql, types = (plan, ()) if isinstance(plan, str) else plan
        typed = re.sub(r"\$(\d+)", lambda found: f"CAST($0 AS {types[int(found[1]) - 1]})", sql)
        self.executed.append(sql)
        marks = re.sub(r"\$0", "%s", typed.replace("%", "%%"))
        try:
            with self.connection.transaction():  # an error undoes nothing but its statement
                return Result(self.connection.execute(marks, values or None, binary=True))
        except psycopg.Error as error:
            raise self.Error(error) from error


@pytest.fixture
def plpy(adapter: Adapter, postgres_url: str) -> Iterator[Plpy]:
    """A session of the server that ``adapter`` has a store in."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        yield Plpy(connection)


@pytest.fixture
def inside(plpy: Plpy, schema: str) -> Adapter:
    return registry.inside_postgres(plpy, schema)[0]


def test_what_is_read_is_what_is_read_from_outside(adapter: Adapter, inside: Adapter) -> None:
    pages = add_random_pages(adapter, 40, size=500)
    with adapter.transaction():
        model_id = adapter.insert_model(model_row("\xe9'%b", metadata='{"share": "100 %"}'))
        adapter.insert_tensors([tensor_row(model_id, 0, "a"), tensor_row(model_id, 1, "b")])
        adapter.put_job("job", "{}", "", "open")
    assert inside.schema_version() == adapter.schema_version()
    assert inside.meta() == adapter.meta()
    assert inside.epoch() == adapter.epoch()
    assert inside.models(state=None) == adapter.models(state=None) != []
    assert inside.models(name="\xe9'%b", state=None) == adapter.models(state=None)
    assert inside.tensors(model_id) == adapter.tensors(model_id) != []
    assert inside.jobs() == adapter.jobs() != []
    assert inside.page_rows(ids=list(pages)) == adapter.page_rows(ids=list(pages))
    asked = [*pages, max(pages) + 1]
    assert dict(inside.read_pages(asked)) == dict(adapter.read_pages(asked)) == pages
    assert list(inside.read_pages([])) == []
    assert inside.integrity_errors() == adapter.integrity_errors()
    inside.close()


def test_a_statement_is_prepared_once_for_each_kind_of_values(
    adapter: Adapter, inside: Adapter, plpy: Plpy
) -> None:
    """`Plpy.prepare` takes none a second time."""
    pages = add_random_pages(adapter, 3, size=500)
    for page_id in pages:
        inside.models()
        inside.models(name="m")
        assert list(inside.read_pages([page_id])) == [(page_id, pages[page_id])]
        inside.page_rows(ids=[page_id])
    assert sum(plpy.executed.count(sql) for sql, _ in plpy.prepared) > 2 * len(plpy.prepared) > 0


def test_it_sees_what_the_query_sees_that_called(
    adapter: Adapter, inside: Adapter, plpy: Plpy, schema: str
) -> None:
    with adapter.transaction():
        adapter.bump_epoch()
    with plpy.connection.transaction(force_rollback=True):
        plpy.connection.execute(f"UPDATE {schema}.meta SET value = '7' WHERE name = 'epoch'")  # noqa: S608
        with inside.snapshot(), inside.snapshot():
            assert inside.epoch() == 7
    assert inside.epoch() == adapter.epoch() == 1


def test_nothing_is_written(inside: Adapter, plpy: Plpy) -> None:
    assert inside.read_only
    with pytest.raises(ReadOnlyError, match="cannot be changed"), inside.transaction():
        pytest.fail("it began")
    with pytest.raises(ReadOnlyError):
        inside.compact()
    with pytest.raises(ReadOnlyError):
        inside.create_schema({})
    assert not any(re.match("(?i)BEGIN|COMMIT|VACUUM|CREATE", sql) for sql in plpy.executed)


def test_a_thread_of_its_own_is_refused(inside: Adapter) -> None:
    """A server's process is one thread, which another could end."""
    with pytest.raises(StoreError, match="a thread of its own cannot read from within the server"):
        in_thread(inside.epoch)
    assert inside.epoch() == 0


def test_errors_are_told_once_and_in_one_line(inside: Adapter, plpy: Plpy, schema: str) -> None:
    """A read was tried again for ten seconds, in a transaction that its failure had doomed."""
    plpy.connection.execute(f"DROP TABLE {schema}.models CASCADE")
    with pytest.raises(NotAStoreError, match=f"tables of schema {schema} were dropped") as caught:
        inside.models()
    assert "\n" not in str(caught.value)
    plpy.connection.execute(
        f"CREATE FUNCTION {schema}.doomed() RETURNS text LANGUAGE plpgsql AS "
        "$$BEGIN RAISE 'could not serialize access' USING ERRCODE = '40001'; END$$"
    )
    plpy.connection.execute(
        f"DROP TABLE {schema}.jobs; CREATE VIEW {schema}.jobs AS SELECT {schema}.doomed() AS id, "
        "'' AS spec, '' AS cursor, '' AS state"
    )
    plpy.executed.clear()
    with pytest.raises(StoreError, match="could not serialize access"):
        inside.jobs()
    assert len(plpy.executed) == 1


def test_where_it_is_and_what_memory_it_may_use(plpy: Plpy, schema: str) -> None:
    there, memory, _ = registry.inside_postgres(plpy, schema)
    assert (there.url, memory) == (f"postgresql:///postgres?schema={schema}", None)
    plpy.connection.execute("SET pydedup.memory = '5MiB'")
    there, memory, _ = registry.inside_postgres(Plpy(plpy.connection), "pydedup")
    assert (there.url, memory) == ("postgresql:///postgres", "5MiB")
    assert there.schema_version() is None
