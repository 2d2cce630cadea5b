# SPDX-License-Identifier: Apache-2.0

"""`pydedup.sql.register`: functions on a connection of the user's own."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

import pydedup
import pydedup.sql
from pydedup.errors import (
    ArgumentError,
    NotAStoreError,
    NotFoundError,
    StoreError,
    UnavailableError,
)
from pydedup.graph import Graph, Node
from pydedup.testing._contract_base import with_option

from .conftest import add, features, linear


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "models.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def x() -> np.ndarray:
    return features(200)


@pytest.fixture
def connection(path: Path, url: str, x: np.ndarray) -> Iterator[sqlite3.Connection]:
    """A connection to a file that holds a store with m@1, and rows of a user's."""
    add(url, "m@1", seed=1)
    with contextlib.closing(sqlite3.connect(path)) as opened:
        opened.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, f0, f1, f2, v BLOB)")
        rows = [[i + 1, *map(float, row), row.tobytes()] for i, row in enumerate(x)]
        opened.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?)", rows)
        opened.commit()
        yield opened


def answers(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    product: np.ndarray = x @ w.T
    return product[:, 0]


def weights_of(url: str, name: str) -> np.ndarray:
    with pydedup.open(url, mode="r") as store:
        return store.load(name)["w"]


def test_the_python_of_the_documentation_runs(
    connection: sqlite3.Connection, url: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(url, "churn@1")
    with pydedup.open(url) as store:
        store.alias("churn", "prod", "1")
    connection.execute("CREATE VIEW customers AS SELECT id, f0 age, f1 visits, f2 spent FROM t")
    connection.commit()
    monkeypatch.chdir(path.parent)
    text = (Path(__file__).parents[2] / "docs" / "scoring.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    try:
        exec(compile(first, "scoring.md", "exec"), names)
        with pytest.raises(ArgumentError, match="there are 2 features, and the model takes 3"):
            exec(compile(second, "scoring.md", "exec"), names)
    finally:
        names["connection"].close()


def test_a_number_for_each_row(connection: sqlite3.Connection, url: str, x: np.ndarray) -> None:
    pydedup.sql.register(connection)
    rows = connection.execute(
        "SELECT pydedup_predict('m@1', f0, f1, f2), pydedup_predict('m', v) FROM t ORDER BY id"
    ).fetchall()
    wanted = answers(weights_of(url, "m@1"), x)
    np.testing.assert_allclose([row[0] for row in rows], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([row[1] for row in rows], wanted, rtol=1e-5, atol=1e-6)
    # In SQL it is a function like any other.
    ((count,),) = connection.execute(
        "SELECT COUNT(*) FROM t WHERE pydedup_predict('m@1', f0, f1, f2) > 0"
    ).fetchall()
    assert count == int((wanted > 0).sum())


@pytest.mark.parametrize("name", ["a?b.db", "a?timeout=5"])
def test_a_file_of_any_name(name: str, tmp_path: Path) -> None:
    """The name of a connection's file was taken for a URL with options."""
    with pydedup.open(tmp_path / name) as store:
        store.add("m@1", linear()[0], graph=linear()[1])
    with contextlib.closing(sqlite3.connect(tmp_path / name)) as connection:
        pydedup.sql.register(connection)
        assert connection.execute("SELECT pydedup_model('m')").fetchone() == ("m@1",)


def test_blobs_and_json(connection: sqlite3.Connection, url: str, x: np.ndarray) -> None:
    w = add(url, "many@1", outputs=5)
    pydedup.sql.register(connection)
    ((text, blob, listed),) = connection.execute(
        "SELECT pydedup_predict('many', f0, f1, f2), pydedup_predict_blob('many', v), "
        "pydedup_predict_json('many', json_array(f0, f1, f2)) FROM t WHERE id = 3"
    ).fetchall()
    wanted = x[2] @ w.T
    for found in (json.loads(text), np.frombuffer(blob, "<f4"), json.loads(listed)):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    rows = connection.execute(
        "SELECT t.id, e.key, e.value FROM t, "
        "json_each(pydedup_predict_json('many', json_array(f0, f1, f2))) e ORDER BY 1, 2"
    ).fetchall()
    assert len(rows) == 5 * len(x)
    np.testing.assert_allclose([row[2] for row in rows[10:15]], wanted, rtol=1e-5, atol=1e-6)
    ((one,),) = connection.execute("SELECT pydedup_predict_json('m', '[1, 0, 0]')").fetchall()
    assert json.loads(one) == pytest.approx([weights_of(url, "m")[0, 0]])


def test_several_named_outputs(connection: sqlite3.Connection, url: str) -> None:
    nodes = (Node("linear", ("x",), "y", {"weight": "w"}), Node("relu", ("y",), "z"))
    with pydedup.open(url) as store:
        store.add("n@1", {"w": np.eye(3, dtype=np.float32)}, graph=Graph(("x",), ("y", "z"), nodes))
    functions = pydedup.sql.register(connection)
    ((text,),) = connection.execute("SELECT pydedup_predict('n', 1, -2, 3)").fetchall()
    assert json.loads(text) == {"y": [1, -2, 3], "z": [1, 0, 3]}
    with pytest.raises(ArgumentError, match="several outputs"), functions.raising():
        connection.execute("SELECT pydedup_predict_blob('n', '[1, 2, 3]')").fetchall()


def test_ids(connection: sqlite3.Connection, url: str) -> None:
    weight = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    nodes = (
        Node("embedding", ("ids",), "e", {"weight": "w"}),
        Node("mean", ("e",), "m", attrs={"axis": [1, 2]}),
    )
    with pydedup.open(url) as store:
        store.add("e@1", {"w": weight}, graph=Graph(("ids",), ("m",), nodes))
    pydedup.sql.register(connection)
    ((one, two),) = connection.execute(
        "SELECT pydedup_predict('e', 5, 99), pydedup_predict('e', '[1, 2, 3]')"
    ).fetchall()
    assert one == pytest.approx(weight[[5, 99]].mean(), rel=1e-5)
    assert two == pytest.approx(weight[[1, 2, 3]].mean(), rel=1e-5)


def test_null_gives_null(connection: sqlite3.Connection) -> None:
    pydedup.sql.register(connection)
    ((one, two, three),) = connection.execute(
        "SELECT pydedup_predict('m', 1, NULL, 3), pydedup_predict_blob('m', NULL), "
        "pydedup_predict_json('m', NULL)"
    ).fetchall()
    assert (one, two, three) == (None, None, None)


WRONG = {
    "pydedup_predict('m', 1, 2)": (ArgumentError, "there are 2 features, and the model takes 3"),
    "pydedup_predict('m', 1, 'a', 3)": (ArgumentError, "feature 2 is no number but the text 'a'"),
    "pydedup_predict('m', 1, 9e999, 3)": (ArgumentError, "feature 2 is inf"),
    "pydedup_predict('m', 1, 9e99, 3)": (ArgumentError, "beyond what float32 holds"),
    "pydedup_predict('none', 1, 2, 3)": (NotFoundError, "no model 'none'"),
    "pydedup_predict('m@9', 1, 2, 3)": (NotFoundError, "no version or alias '9'"),
    "pydedup_predict('x; DROP TABLE t', 1, 2, 3)": (NotFoundError, "no model 'x; DROP TABLE t'"),
    "pydedup_predict(NULL, 1, 2, 3)": (ArgumentError, "name@version, not NULL"),
    "pydedup_predict('m', 1)": (ArgumentError, "there is 1 feature, and the model takes 3"),
    "pydedup_predict('m')": (ArgumentError, "takes a model and features"),
    "pydedup_predict_blob('m', X'0102')": (ArgumentError, "2 bytes"),
    "pydedup_predict_json('m', '{}')": (ArgumentError, "no array of numbers"),
    "pydedup_predict_json('m', '[1, 2')": (ArgumentError, "no JSON array"),
    "pydedup_predict_json('m', '[1, 2]')": (
        ArgumentError,
        "2 numbers, and the model takes 3",
    ),
    "pydedup_model('none')": (NotFoundError, "no model 'none'"),
}


def test_what_went_wrong_can_be_seen(connection: sqlite3.Connection) -> None:
    functions = pydedup.sql.register(connection)
    assert connection.execute("SELECT pydedup_last_error()").fetchall() == [(None,)]
    for call, (kind, message) in WRONG.items():
        with pytest.raises(sqlite3.OperationalError, match="user-defined function raised"):
            connection.execute(f"SELECT {call}").fetchall()
        assert isinstance(functions.last_error, kind), call
        ((said,),) = connection.execute("SELECT pydedup_last_error()").fetchall()
        assert message in said, call
        with pytest.raises(kind, match=re.escape(message)) as caught, functions.raising():
            connection.execute(f"SELECT {call}").fetchall()
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    # An error of another cause stays what it is.
    with pytest.raises(sqlite3.OperationalError, match="no such table"), functions.raising():
        connection.execute("SELECT * FROM missing")
    assert connection.execute("SELECT pydedup_predict('m', 1, 2, 3)").fetchone()[0] is not None


def test_an_alias_takes_effect_with_the_next_statement(
    connection: sqlite3.Connection, url: str, x: np.ndarray
) -> None:
    w1, w2 = weights_of(url, "m@1"), add(url, "m@2", seed=2)
    pydedup.sql.register(connection)
    with pydedup.open(url) as store:
        store.alias("m", "prod", "1")
        cursor = connection.execute("SELECT pydedup_predict('m@prod', f0, f1, f2) FROM t")
        found = [cursor.fetchone()[0] for _ in range(50)]
        store.alias("m", "prod", "2")  # in the middle of a statement
        found += [value for (value,) in cursor.fetchall()]
        np.testing.assert_allclose(found, answers(w1, x), rtol=1e-5, atol=1e-6)
        rows = connection.execute("SELECT pydedup_predict('m@prod', f0, f1, f2) FROM t").fetchall()
        np.testing.assert_allclose([r[0] for r in rows], answers(w2, x), rtol=1e-5, atol=1e-6)
        # A transaction sees what it saw when it began, of models as of rows.
        connection.execute("BEGIN")
        connection.execute("SELECT COUNT(*) FROM t").fetchall()
        store.alias("m", "prod", "1")
        said = "SELECT pydedup_predict('m@prod', 1, 0, 0)"
        assert connection.execute(said).fetchone()[0] == pytest.approx(w2[0, 0])
        connection.execute("COMMIT")
        assert connection.execute(said).fetchone()[0] == pytest.approx(w1[0, 0])


def test_what_a_transaction_undid_is_not_remembered(
    connection: sqlite3.Connection, url: str
) -> None:
    w1, w2 = weights_of(url, "m@1"), add(url, "m@2", seed=2)
    pydedup.sql.register(connection)
    said = "SELECT pydedup_predict('m', 1, 0, 0)"
    assert connection.execute(said).fetchone()[0] == pytest.approx(w2[0, 0])
    connection.execute("BEGIN")
    connection.execute("UPDATE pydedup_models SET state = 'staging' WHERE version = '2'")
    connection.execute("UPDATE pydedup_meta SET value = '999' WHERE name = 'epoch'")
    assert connection.execute(said).fetchone()[0] == pytest.approx(w1[0, 0])
    connection.execute("ROLLBACK")
    assert connection.execute(said).fetchone()[0] == pytest.approx(w2[0, 0])


def test_what_a_transaction_sees_holds_for_models_it_had_not_asked_for(
    connection: sqlite3.Connection, url: str
) -> None:
    """An address was looked up in the newest state when it was first asked for."""
    add(url, "m@2", seed=2)
    functions = pydedup.sql.register(connection)
    with pydedup.open(url) as store:
        store.alias("m", "prod", "1")
        connection.execute("BEGIN")
        connection.execute("SELECT COUNT(*) FROM t").fetchall()
        store.alias("m", "prod", "2")
        add(url, "m@3", seed=3)
        said = "SELECT pydedup_model('m@prod'), pydedup_model('m')"
        assert connection.execute(said).fetchall() == [("m@1", "m@2")]
        store.remove("m@1")
        with pytest.raises(NotFoundError, match="m@1 was removed"), functions.raising():
            connection.execute("SELECT pydedup_predict('m@prod', 1, 2, 3)").fetchall()
        connection.execute("COMMIT")
        assert connection.execute(said).fetchall() == [("m@2", "m@3")]


def test_one_version_of_each_of_many_models_for_a_statement(
    connection: sqlite3.Connection, url: str
) -> None:
    """With more models than are kept ready, a statement went on with versions of two states."""
    count = 70
    with pydedup.open(url) as store:
        for i in range(count):
            for version in "12":
                model, graph = linear(seed=10 * i + int(version))
                store.add(f"n{i}@{version}", model, graph=graph)
            store.alias(f"n{i}", "prod", "1")
        pydedup.sql.register(connection)
        cursor = connection.execute(
            "SELECT pydedup_model('n' || (id % ?) || '@prod') FROM t ORDER BY id", [count]
        )
        found = [cursor.fetchone()[0] for _ in range(100)]
        for i in range(count):
            store.alias(f"n{i}", "prod", "2")
        found += [value for (value,) in cursor.fetchall()]
    assert found == [f"n{i % count}@1" for i in range(1, 201)]


def test_one_version_for_a_statement_wherever_the_store_is(
    path: Path, url: str, x: np.ndarray
) -> None:
    w1, w2 = add(url, "m@1", seed=1), add(url, "m@2", seed=2)
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        with pytest.raises(ArgumentError, match="in memory"):
            pydedup.sql.register(connection)
        functions = pydedup.sql.register(connection, url)
        connection.execute("CREATE TABLE t (f0, f1, f2)")
        connection.executemany("INSERT INTO t VALUES (?, ?, ?)", x.tolist())
        with pydedup.open(url) as store:
            store.alias("m", "prod", "1")
            cursor = connection.execute(
                "SELECT pydedup_predict(pydedup_model('m@prod'), f0, f1, f2) FROM t"
            )
            found = [cursor.fetchone()[0] for _ in range(50)]
            store.alias("m", "prod", "2")
            found += [value for (value,) in cursor.fetchall()]
            np.testing.assert_allclose(found, answers(w1, x), rtol=1e-5, atol=1e-6)
        ((said,),) = connection.execute("SELECT pydedup_model('m@prod')").fetchall()
        assert said == "m@2"
        found = [r[0] for r in connection.execute("SELECT pydedup_predict('m', f0, f1, f2) FROM t")]
        np.testing.assert_allclose(found, answers(w2, x), rtol=1e-5, atol=1e-6)
        functions.close()
        with pytest.raises(StoreError, match="closed"), functions.raising():
            connection.execute("SELECT pydedup_predict('m', f0, f1, f2) FROM t").fetchall()


def test_a_store_on_any_database(store_url: str) -> None:
    w = add(store_url, "m@1")
    with (
        pydedup.open(store_url) as store,
        contextlib.closing(sqlite3.connect(":memory:")) as connection,
    ):
        pydedup.sql.register(connection, store)
        ((found,),) = connection.execute("SELECT pydedup_predict('m', 0, 1, 0)").fetchall()
        assert found == pytest.approx(w[0, 1])


def test_tables_that_are_made_anew_are_another_store(
    postgres_url: str, postgres_schema: str
) -> None:
    """With an epoch as before, its models of the same names were those of the store before."""
    url = with_option(postgres_url, f"schema={postgres_schema}")
    add(url, "m@1", seed=1)
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        functions = pydedup.sql.register(connection, url)
        said = "SELECT pydedup_predict('m', 1, 0, 0)"
        assert connection.execute(said).fetchone()
        with psycopg.connect(postgres_url, autocommit=True) as server:
            server.execute(f"DROP SCHEMA {postgres_schema} CASCADE")
        w = add(url, "m@1", seed=2)
        with pytest.raises(UnavailableError, match="another store"), functions.raising():
            connection.execute(said).fetchall()
        functions = pydedup.sql.register(connection, url)
        assert connection.execute(said).fetchone() == (pytest.approx(w[0, 0]),)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DROP TABLE pydedup_meta", "cannot be read as a store: no such table"),
        ("DELETE FROM pydedup_meta WHERE name = 'epoch'", "lacks its id or epoch; restore a"),
    ],
)
def test_a_store_that_is_none_any_more_is_told(
    connection: sqlite3.Connection, change: str, said: str
) -> None:
    functions = pydedup.sql.register(connection)
    call = "SELECT pydedup_predict('m', 1, 2, 3)"
    assert connection.execute(call).fetchone()[0] is not None
    connection.execute(change)
    with pytest.raises(StoreError, match=said), functions.raising():
        connection.execute(call).fetchone()


def test_connections_as_users_have_them(connection: sqlite3.Connection, path: Path) -> None:
    connection.row_factory = lambda cursor, row: {"only": row}
    connection.text_factory = bytes
    pydedup.sql.register(connection)
    (row,) = connection.execute("SELECT pydedup_model('m')").fetchall()
    assert row == {"only": (b"m@1",)}
    # In the middle of a user's own transaction, and from within his own triggers.
    connection.row_factory = None
    connection.execute("CREATE TABLE scored (id, y)")
    connection.execute(
        "CREATE TEMP TRIGGER follow AFTER INSERT ON t BEGIN "
        "INSERT INTO scored VALUES (new.id, pydedup_predict('m', new.f0, new.f1, new.f2)); END"
    )
    connection.execute("INSERT INTO t VALUES (1000, 1, 2, 3, NULL)")
    connection.rollback()
    assert connection.execute("SELECT COUNT(*) FROM t").fetchone() == (200,)
    connection.execute("INSERT INTO t VALUES (1000, 1, 2, 3, NULL)")
    connection.commit()
    ((key, y),) = connection.execute("SELECT id, y FROM scored").fetchall()
    assert key == 1000
    assert isinstance(y, float)


def test_register_again_and_wrongly(connection: sqlite3.Connection, tmp_path: Path) -> None:
    pydedup.sql.register(connection)
    pydedup.sql.register(connection)
    assert connection.execute("SELECT pydedup_model('m')").fetchone() == ("m@1",)
    with pytest.raises(ArgumentError, match="a connection of the module sqlite3"):
        pydedup.sql.register(object())
    with contextlib.closing(sqlite3.connect(tmp_path / "plain.db")) as other:
        other.execute("CREATE TABLE t (x)")
        other.commit()
        with pytest.raises(NotAStoreError):
            pydedup.sql.register(other)
        pydedup.sql.register(other, f"sqlite:///{tmp_path / 'models.db'}")
        assert other.execute("SELECT pydedup_model('m')").fetchone() == ("m@1",)


def test_a_removed_model_is_told(connection: sqlite3.Connection, url: str) -> None:
    functions = pydedup.sql.register(connection)
    said = "SELECT pydedup_predict('m', 1, 2, 3)"
    assert connection.execute(said).fetchone()
    with pydedup.open(url) as store:
        store.remove("m@1")
    with pytest.raises(NotFoundError), functions.raising():
        connection.execute(said).fetchall()
    model, graph = linear(seed=5)
    with pydedup.open(url) as store:
        store.add("m@1", model, graph=graph)
        store.vacuum()
    assert connection.execute(said).fetchone()[0] == pytest.approx(
        float(model["w"][0] @ np.array([1, 2, 3])), rel=1e-5
    )


def test_threads_with_connections_of_their_own(
    connection: sqlite3.Connection, path: Path, url: str, x: np.ndarray
) -> None:
    wanted = answers(weights_of(url, "m@1"), x)
    wrong: list[object] = []

    def work() -> None:
        try:
            with contextlib.closing(sqlite3.connect(path)) as own:
                pydedup.sql.register(own, shared)
                for _ in range(3):
                    rows = own.execute("SELECT pydedup_predict('m', f0, f1, f2) FROM t").fetchall()
                    np.testing.assert_allclose([r[0] for r in rows], wanted, rtol=1e-5, atol=1e-6)
        except BaseException as error:
            wrong.append(error)

    with pydedup.open(url, mode="r") as shared:
        threads: list[threading.Thread] = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_nothing_outlives_the_connection(path: Path, url: str, fd_count: Callable[[], int]) -> None:
    add(url, "m@1")
    before = fd_count()
    for _ in range(5):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            pydedup.sql.register(connection)
            connection.execute("SELECT pydedup_predict('m', 1, 2, 3)").fetchall()
    assert fd_count() <= before


@pytest.fixture
def fd_count() -> Callable[[], int]:
    return lambda: len(list(Path("/proc/self/fd").iterdir()))
