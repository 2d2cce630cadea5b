# SPDX-License-Identifier: Apache-2.0

"""`pydedup sql`: functions in PL/Python in a real server, of Debian's packages.

Skipped where its Python is another than ours; `make test-plpython` builds pydedup for that one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup import policies
from pydedup.graph import Graph, Node
from pydedup.testing._contract_base import with_option
from pydedup.testing.servers import PlpythonServer, unused_name

from .conftest import add, features, linear


def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pydedup", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    return done


class Place:
    """A store in a schema of its own, with the functions in it."""

    def __init__(self, server: PlpythonServer) -> None:
        self.server = server
        self.schema = unused_name()
        self.url = with_option(server.url, f"schema={self.schema}")

    def install(self) -> None:
        run("sql", "install", self.url, "--python-path", self.server.python_path)

    def connect(self, role: str = "postgres") -> psycopg.Connection[Any]:
        url = self.server.url.replace("postgres@", f"{role}@", 1)
        return psycopg.connect(url, autocommit=True, options=f"-c search_path={self.schema},public")

    def ask(self, statement: str, values: list[Any] | None = None, **options: Any) -> list[Any]:
        with self.connect(**options) as connection:
            return connection.execute(statement, values).fetchall()


@pytest.fixture
def place(plpython: PlpythonServer) -> Iterator[Place]:
    made = Place(plpython)
    with pydedup.open(made.url):
        pass
    made.install()
    yield made
    with made.connect() as connection:
        connection.execute(f"DROP SCHEMA {made.schema} CASCADE")


def test_the_python_of_the_server_is_that_of_the_system(
    plpython: PlpythonServer, server_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a virtual environment's that came first on the PATH, and found our pydedup there."""
    made = server_folder / "venv"
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", made], check=True)
    monkeypatch.setenv("PATH", f"{made / 'bin'}:{os.environ['PATH']}")
    server = PlpythonServer(server_folder / "prefix")
    try:
        with psycopg.connect(server.url) as connection:
            connection.execute("CREATE EXTENSION plpython3u")
            connection.execute(
                "CREATE FUNCTION prefix() RETURNS text LANGUAGE plpython3u AS "
                "'import sys; return sys.prefix'"
            )
            assert connection.execute("SELECT prefix()").fetchall() == [("/usr",)]
    finally:
        server.stop()


def test_predictions_are_those_of_the_store(place: Place) -> None:
    rng = np.random.default_rng(0)
    base = {
        "a": rng.standard_normal((700, 300)).astype(np.float32),
        "b": rng.standard_normal((4, 700)).astype(np.float32),
    }
    tuned = {"a": base["a"] * np.float32(1.001), "b": base["b"] + np.float32(0.5)}
    nodes = (
        Node("linear", ("x",), "h", {"weight": "a"}),
        Node("relu", ("h",), "r"),
        Node("linear", ("r",), "y", {"weight": "b"}),
    )
    graph = Graph(("x",), ("y",), nodes)
    x = rng.standard_normal((6, 300)).astype(np.float32)
    with pydedup.open(place.url) as store:
        store.add("net@1", base, graph=graph)
        store.add("net@2", tuned, graph=graph, policy=policies.Bounded(0.001))  # deltas on net@1
        wanted = {version: store.predict(f"net@{version}", x) for version in "12"}
    for version, rows in wanted.items():
        name = f"net@{version}"
        found = place.ask("SELECT * FROM pydedup_predict_many(%s, %s)", [name, x.tolist()])
        np.testing.assert_allclose([row[0] for row in found], rows, rtol=1e-4, atol=1e-3)
        ((one,),) = place.ask("SELECT pydedup_predict_array(%s, %s)", [name, x[0].tolist()])
        np.testing.assert_allclose(one, rows[0], rtol=1e-4, atol=1e-3)
        ((blob,),) = place.ask("SELECT pydedup_predict_blob(%s, %s)", [name, x[1].tobytes()])
        np.testing.assert_allclose(np.frombuffer(blob, "<f4"), rows[1], rtol=1e-4, atol=1e-3)
        text = json.dumps(x[2].tolist())
        ((listed,),) = place.ask("SELECT pydedup_predict_json(%s, %s)", [name, text])
        np.testing.assert_allclose(listed, rows[2], rtol=1e-4, atol=1e-3)


def test_a_number_for_each_row(place: Place) -> None:
    w, x = add(place.url, "m@1"), features(100)
    with place.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, f0 real, f1 float8, f2 numeric)")
        with connection.cursor() as cursor:
            rows = [[i + 1, *map(float, row)] for i, row in enumerate(x)]
            cursor.executemany("INSERT INTO t VALUES (%s, %s, %s, %s)", rows)
        found = connection.execute(
            "SELECT pydedup_predict('m', f0, f1, f2::float8) FROM t ORDER BY id"
        ).fetchall()
        wanted = (x @ w.T)[:, 0]
        np.testing.assert_allclose([row[0] for row in found], wanted, rtol=1e-5, atol=1e-6)
        # All rows in one call, each with its key.
        found = connection.execute(
            "SELECT r.id, r.y[1] FROM (SELECT array_agg(id ORDER BY id) AS ids, "
            "array_agg(ARRAY[f0, f1, f2::float8] ORDER BY id) AS x FROM t) a, "
            "ROWS FROM (unnest(a.ids), pydedup_predict_many('m', a.x)) AS r(id, y)"
        ).fetchall()
        assert [row[0] for row in found] == list(range(1, 101))
        np.testing.assert_allclose([row[1] for row in found], wanted, rtol=1e-5, atol=1e-6)
        assert connection.execute(
            "SELECT pydedup_predict('m', 1, NULL, 3), pydedup_predict(NULL, 1, 2, 3), "
            "pydedup_predict_json('m', NULL), pydedup_model('m')"
        ).fetchall() == [(None, None, None, "m@1")]
        ((known,),) = connection.execute("SELECT pydedup_version()").fetchall()
        assert known == pydedup.__version__
        connection.execute("DROP TABLE t")


WRONG = {
    "pydedup_predict('m', 1, 2)": ("22023", "there are 2 features, and the model takes 3"),
    "pydedup_predict('m', 1, 'NaN', 3)": ("22023", "feature 2 is nan"),
    "pydedup_predict('few', 1, 2, 3)": ("22023", "pydedup_predict_array returns them"),
    "pydedup_predict('none', 1, 2, 3)": ("42704", "no model 'none'"),
    "pydedup_predict('m@9', 1, 2, 3)": ("42704", "no version or alias '9'"),
    "pydedup_predict('x''; DROP TABLE t; --', 1, 2, 3)": ("42704", "no model"),
    "pydedup_predict_json('m', '{}')": ("22023", "no array of numbers"),
    "pydedup_predict_blob('m', '\\x0102')": ("22023", "2 bytes"),
    "pydedup_predict_many('m', ARRAY[1, 2, 3])": ("22023", "takes an array of rows"),
    "pydedup_predict_many('m', ARRAY[[1, 2, 3], [1, 2, NULL]])": ("22023", "row 2: feature 3"),
    "pydedup_model('')": ("22023", "model name"),
}


def test_the_sql_of_the_documentation_runs(place: Place) -> None:
    w, x = add(place.url, "churn@1"), features(20)
    text = (Path(__file__).parents[2] / "docs" / "scoring.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    with pydedup.open(place.url) as store, place.connect() as connection:
        store.alias("churn", "prod", "1")
        connection.execute(
            "CREATE TABLE customers (id int, age float8, visits float8, spent float8)"
        )
        with connection.cursor() as cursor:
            rows = [[i + 1, *map(float, row)] for i, row in enumerate(x)]
            cursor.executemany("INSERT INTO customers VALUES (%s, %s, %s, %s)", rows)
        one, many = block.replace("pydedup.", f"{place.schema}.").rstrip().rstrip(";").split(";")
        wanted = (x @ w.T)[:, 0]
        for statement in (one, many):
            found = dict(connection.execute(statement).fetchall())
            values = [np.ravel(found[i + 1])[0] for i in range(20)]
            np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)


def test_errors_are_those_of_the_server(place: Place) -> None:
    w = add(place.url, "m@1")
    add(place.url, "few@1", outputs=2)
    with place.connect() as connection:
        for call, (code, message) in WRONG.items():
            with pytest.raises(psycopg.Error) as caught:
                connection.execute(f"SELECT {call}")
            assert caught.value.sqlstate == code, call
            assert message in str(caught.value), call
        found = connection.execute("SELECT pydedup_predict('m', 0, 1, 0)").fetchall()
        assert found == [(pytest.approx(w[0, 1]),)]


def test_an_alias_takes_effect_with_the_next_statement(place: Place) -> None:
    w1, w2 = add(place.url, "m@1", seed=1), add(place.url, "m@2", seed=2)
    query = "SELECT pydedup_predict('m@prod', i % 7, 1, 1) FROM generate_series(1, 100) AS i"
    x = np.array([[i % 7, 1, 1] for i in range(1, 101)], np.float32)
    with pydedup.open(place.url) as store, place.connect() as connection:
        store.alias("m", "prod", "1")
        with connection.transaction(), connection.cursor("rows") as cursor:
            cursor.execute(query)
            found = [row[0] for row in cursor.fetchmany(50)]
            store.alias("m", "prod", "2")
            found += [row[0] for row in cursor.fetchall()]
        np.testing.assert_allclose(found, (x @ w1.T)[:, 0], rtol=1e-5, atol=1e-6)
        found = [row[0] for row in connection.execute(query).fetchall()]
        np.testing.assert_allclose(found, (x @ w2.T)[:, 0], rtol=1e-5, atol=1e-6)


def test_a_backend_keeps_one_store_and_forgets_what_is_gone(place: Place) -> None:
    add(place.url, "m@1", seed=1)
    with place.connect() as connection:
        connection.execute("SELECT pydedup_predict('m', 1, 2, 3)")
        connection.execute("SELECT pydedup_predict('m', 1, 2, 3)")
        said = f"""DO LANGUAGE plpython3u $$
assert list(GD['pydedup']) == ['{place.schema}']
calls = GD['pydedup']['{place.schema}']._ready
assert len(calls._models) == 1, calls._models
$$"""
        connection.execute(said)
        with pydedup.open(place.url) as store:
            store.remove("m@1")
        with pytest.raises(psycopg.Error, match="no model 'm'"):
            connection.execute("SELECT pydedup_predict('m', 1, 2, 3)")
        model, graph = linear(seed=5)
        with pydedup.open(place.url) as store:
            store.add("m@1", model, graph=graph)
            store.vacuum()
        ((found,),) = connection.execute("SELECT pydedup_predict('m', 1, 2, 3)").fetchall()
        assert found == pytest.approx(float(model["w"][0] @ np.array([1, 2, 3])), rel=1e-5)
        # With a budget of its own, said before the first call of a session.
    with place.connect() as connection:
        connection.execute("SET pydedup.memory = '8MiB'")
        assert connection.execute("SELECT pydedup_predict('m', 1, 2, 3)").fetchone()
    with place.connect() as connection:
        connection.execute("SET pydedup.memory = 'much'")
        with pytest.raises(psycopg.Error, match="much"):
            connection.execute("SELECT pydedup_predict('m', 1, 2, 3)")


def test_a_session_goes_on_with_a_store_that_takes_the_place(place: Place) -> None:
    """Tables that were made anew with an epoch as before were served as the store before."""
    add(place.url, "m@1", seed=1)
    with place.connect() as connection:
        assert connection.execute("SELECT pydedup_predict('m', 1, 0, 0)").fetchone()
        connection.execute(f"DROP SCHEMA {place.schema} CASCADE")
        w = add(place.url, "m@1", seed=2)
        place.install()
        found = connection.execute("SELECT pydedup_predict('m', 1, 0, 0)").fetchall()
        assert found == [(pytest.approx(w[0, 0]),)]


def test_a_model_larger_than_the_pool_on_the_one_thread_of_a_backend(place: Place) -> None:
    rng = np.random.default_rng(0)
    model = {
        "a": rng.standard_normal((3000, 2000)).astype(np.float32),  # 24 MB
        "b": rng.standard_normal((1, 3000)).astype(np.float32),
    }
    nodes = (
        Node("linear", ("x",), "h", {"weight": "a"}),
        Node("relu", ("h",), "r"),
        Node("linear", ("r",), "y", {"weight": "b"}),
    )
    x = rng.standard_normal((3, 2000)).astype(np.float32)
    with pydedup.open(place.url) as store:
        store.add("wide@1", model, graph=Graph(("x",), ("y",), nodes))
        wanted = store.predict("wide@1", x)
    query = "SELECT * FROM pydedup_predict_many('wide', %s)"
    with place.connect() as connection:
        connection.execute("SET pydedup.memory = '16MiB'")
        for _ in range(3):  # what the last call did would be read ahead in the next
            found = connection.execute(query, [x.tolist()]).fetchall()
            np.testing.assert_allclose([row[0] for row in found], wanted, rtol=1e-3, atol=1e-2)
            connection.execute(
                "DO LANGUAGE plpython3u $$\nimport threading\n"
                "assert threading.active_count() == 1, threading.enumerate()\n$$"
            )
        connection.execute("SET statement_timeout = 50")
        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute(
                "SELECT pydedup_predict_array('wide', array_fill(i::float8, ARRAY[2000])) "
                "FROM generate_series(1, 1000000) AS i"
            )
        connection.execute("SET statement_timeout = 0")
        assert len(connection.execute(query, [x.tolist()]).fetchall()) == 3


def test_roles(place: Place) -> None:
    w = add(place.url, "m@1")
    reader, stranger = unused_name(), unused_name()
    with place.connect() as connection:
        connection.execute(f"CREATE ROLE {reader} LOGIN")
        connection.execute(f"CREATE ROLE {stranger} LOGIN")
        connection.execute(f"GRANT USAGE ON SCHEMA {place.schema} TO {reader}, {stranger}")
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {place.schema} TO {reader}")
        connection.execute(f"GRANT CREATE ON SCHEMA {place.schema} TO {reader}")
    try:
        assert place.ask("SELECT pydedup_predict('m', 1, 0, 0)", role=reader) == [
            (pytest.approx(w[0, 0]),)
        ]
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied"):
            place.ask("SELECT pydedup_predict('m', 1, 0, 0)", role=stranger)
        url = place.url.replace("postgres@", f"{reader}@", 1)
        said = run("sql", "install", url, status=4).stderr
        assert f"user {reader} is no superuser" in said
        said = run("sql", "uninstall", url, status=4).stderr  # was told to ask for GRANT USAGE
        assert f"; let the owner of schema {place.schema}, or an administrator, run this" in said
        assert place.ask("SELECT pydedup_model('m')") == [("m@1",)]
        with place.connect() as connection:
            connection.execute(f"ALTER TABLE {place.schema}.pages ENABLE ROW LEVEL SECURITY")
        with pytest.raises(psycopg.errors.DataCorrupted, match="security may hide rows of pages"):
            place.ask("SELECT pydedup_predict('m', 1, 0, 0)", role=reader)
    finally:
        with place.connect() as connection:
            for role in (reader, stranger):
                connection.execute(f"DROP OWNED BY {role}")
                connection.execute(f"DROP ROLE {role}")


def test_who_asks_may_change_within_a_session(place: Place) -> None:
    """Models that were ready for one role were predicted for the next, whatever that could see."""
    w = add(place.url, "m@1")
    tenant, stranger = unused_name(), unused_name()
    schema, ask = place.schema, "SELECT pydedup_predict('m', 1, 0, 0)"
    with place.connect() as connection:
        for role in (tenant, stranger):
            connection.execute(f"CREATE ROLE {role}")
            connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {tenant}")
        connection.execute(f"GRANT SELECT ON {schema}.meta TO {stranger}")
        connection.execute(f"ALTER TABLE {schema}.models ENABLE ROW LEVEL SECURITY")
        connection.execute(
            f"CREATE POLICY own ON {schema}.models TO {tenant} "
            "USING (current_setting('app.sees', true) = 'm')"
        )
        try:
            found = [(pytest.approx(w[0, 0]),)]
            assert connection.execute(ask).fetchall() == found
            connection.execute(f"SET ROLE {stranger}")
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied"):
                connection.execute(ask)
            connection.execute(f"SET ROLE {tenant}")
            for sees, hides in (("x", True), ("m", False), ("x", True)):
                connection.execute(f"SET app.sees = '{sees}'")
                if hides:
                    with pytest.raises(psycopg.errors.UndefinedObject, match="no model 'm'"):
                        connection.execute(ask)
                else:
                    assert connection.execute(ask).fetchall() == found
            connection.execute("RESET ROLE")
            assert connection.execute(ask).fetchall() == found
        finally:
            connection.execute("RESET ROLE")
            for role in (tenant, stranger):
                connection.execute(f"DROP OWNED BY {role}")
                connection.execute(f"DROP ROLE {role}")


def test_show_and_uninstall(place: Place) -> None:
    w = add(place.url, "m@1")
    shown = run("sql", "show", place.url, "--python-path", place.server.python_path).stdout
    listed = run("sql", "show", place.url, "--python-path", place.server.python_path, "--json")
    statements = json.loads(listed.stdout)["statements"]
    assert "".join(f"{statement};\n" for statement in statements) == shown
    gone = json.loads(run("sql", "uninstall", place.url, "--json").stdout)
    with pytest.raises(psycopg.errors.UndefinedFunction):
        place.ask("SELECT pydedup_model('m')")
    run("sql", "uninstall", place.url)  # of what is gone already
    with place.connect() as connection:
        connection.execute(shown)
    assert place.ask("SELECT pydedup_predict('m', 1, 0, 0)") == [(pytest.approx(w[0, 0]),)]
    document = json.loads(
        run("sql", "install", place.url, "--python-path", place.server.python_path, "--json").stdout
    )
    assert document == {**gone, "version": pydedup.__version__}


def test_installed_by_two_at_once(place: Place) -> None:
    """One of them failed by a key of the server's catalog, as the language was made twice."""
    w = add(place.url, "m@1")
    with place.connect() as connection:
        connection.execute("DROP EXTENSION plpython3u CASCADE")
    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(place.install) for _ in range(3)]:
            done.result()
    assert place.ask("SELECT pydedup_predict('m', 1, 0, 0)") == [(pytest.approx(w[0, 0]),)]


def test_a_python_that_has_no_pydedup(place: Place, tmp_path: Path) -> None:
    add(place.url, "m@1")
    said = run("sql", "install", place.url, "--python-path", "/nowhere", status=4).stderr
    assert "the Python of the server cannot import pydedup" in said
    assert "--python-path" in said
    assert place.ask("SELECT pydedup_model('m')") == [("m@1",)]  # those of before
    for bad in ("relative", "/a$b", "/a\nb"):
        said = run("sql", "install", place.url, "--python-path", bad, status=2).stderr
        assert "must be an absolute path" in said
    quoted = '/it\'s a "folder" \\ of'
    shown = run("sql", "show", place.url, "--python-path", quoted).stdout
    assert repr(quoted) in shown


# ---- without PL/Python --------------------------------------------------------------------------


def test_a_server_without_plpython(postgres_url: str, postgres_schema: str) -> None:
    url = with_option(postgres_url, f"schema={postgres_schema}")
    with pydedup.open(url):
        pass
    with psycopg.connect(postgres_url) as connection:
        there = connection.execute(
            "SELECT 1 FROM pg_available_extensions WHERE name = 'plpython3u'"
        ).fetchall()
    if there:
        pytest.skip("this server has PL/Python")
    said = run("sql", "install", url, status=4).stderr
    assert (
        "the server has no PL/Python; install it there (Debian: apt-get install postgresql-" in said
    )


def test_other_databases(tmp_path: Path, mysql_database: str) -> None:
    sqlite = f"sqlite:///{tmp_path / 's.db'}"
    for url, commands in ((sqlite, ("install", "show")), (mysql_database, ("uninstall",))):
        with pydedup.open(url):
            pass
        for command in commands:
            assert "only PostgreSQL has" in run("sql", command, url, status=2).stderr
