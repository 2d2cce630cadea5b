# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of tables are made here)
"""`pydedup score` as it is run."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pydedup.testing.program import run_here

from .conftest import Tables, add, features

Make = Callable[..., str]


def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = run_here(*arguments)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    return done


def test_score(tables: Tables, source: Make, new_name: Make) -> None:
    w, x, into = add(tables.url, "m@1"), features(50), new_name()
    table = source(x)
    query = ("--query", f"SELECT id, f0, f1, f2 FROM {table} ORDER BY id", "--into", into)
    done = run("score", tables.url, *query, "--model", "m@1")
    assert "scored 50 rows with m@1 into" in done.stdout
    rows = dict(tables.run(f"SELECT id, prediction FROM {into}"))
    np.testing.assert_allclose([rows[i + 1] for i in range(50)], (x @ w.T)[:, 0], rtol=1e-5)
    # Whatever model predicted them; nobody was told how to have another one do it.
    again = "50 were there (to predict them anew, delete them or name another place)"
    assert again in run("score", tables.url, *query, "--model", "m@1").stdout
    report = json.loads(run("score", tables.url, *query, "--model", "m@1", "--json").stdout)
    assert (report["rows"], report["skipped"], report["failed"]) == (0, 50, 0)
    assert (report["model"], report["resumed"], report["failures"]) == ("m@1", False, [])


def test_what_cannot_be_predicted(tables: Tables, source: Make, new_name: Make) -> None:
    add(tables.url, "m@1")
    table, into = source(features(40)), new_name()
    tables.run(f"UPDATE {table} SET f2 = NULL WHERE id > 25")
    score = ("score", tables.url, "--model", "m", "--into", into, "--batch", 10)
    query = ("--query", f"SELECT id, f0, f1, f2 FROM {table} ORDER BY id")
    said = run(*score, *query, status=2).stderr
    assert said.startswith("pydedup: error: row with id 26, and 4 more of its batch: f2 is NULL")
    assert said.count("\n") == 1
    done = run(*score, *query, "--on-error", "skip")
    assert "continuing with m@1, which the work began with" in done.stderr
    assert "scored 5 rows" in done.stdout
    assert "20 were there" in done.stdout
    assert "15 could not be predicted" in done.stdout
    assert done.stdout.count("f2 is NULL") == 10
    assert "  row with key 26: f2 is NULL\n" in done.stdout
    assert "and 5 more" in done.stdout
    report = json.loads(run(*score, *query, "--on-error", "skip", "--json").stdout)
    assert report["failed"] == 15
    assert report["failures"][0] == {"key": 26, "reason": "f2 is NULL"}


def test_keys_are_told_as_sql_has_them(tables: Tables, new_name: Make) -> None:
    """They were Python's: datetime.date(2026, 1, 2), in the document of --json, too."""
    add(tables.url, "m@1")
    query = "SELECT CAST('2026-01-02' AS DATE) AS day, 'x' AS f0, 2 AS f1, 3 AS f2"
    score = ("score", tables.url, "--model", "m@1", "--into", new_name(), "--query", query)
    key = 2026 if tables.url.startswith("sqlite") else "2026-01-02"
    reason = "f0 is no number but the text 'x'"
    assert f"row with day {key}: {reason}; " in run(*score, status=2).stderr
    skipping = (*score, "--on-error", "skip")
    assert f"  row with key {key}: {reason}\n" in run(*skipping).stdout
    score = ("score", tables.url, "--model", "m@1", "--into", new_name(), "--query")
    one = (*score, "SELECT 1 AS id, 1 AS f0, 2 AS f1, 3 AS f2")
    run(*one)
    assert "; 1 was there (" in run(*one).stdout
    assert json.loads(run(*skipping, "--json").stdout)["failures"] == [
        {"key": key, "reason": reason}
    ]


def test_a_long_key_is_whole_in_a_document(tmp_path: Path) -> None:
    """Of bytes it was cut short, as for people."""
    url = f"sqlite:///{tmp_path / 'm.db'}"
    add(url, "m@1")
    query = f"SELECT X'{'01' * 64}' AS k, 'x' AS f0, 2 AS f1, 3 AS f2"
    score = ("score", url, "--model", "m", "--into", "p", "--query", query, "--on-error", "skip")
    (failure,) = json.loads(run(*score, "--json").stdout)["failures"]
    assert failure["key"] == f"0x{'01' * 64}"
    assert f"row with key 0x{'01' * 39}... (130 characters): " in run(*score).stdout


def test_nothing_found_and_nothing_understood(tables: Tables, source: Make, new_name: Make) -> None:
    add(tables.url, "m@1")
    table, into = source(features(1)), new_name()
    score = ("score", tables.url, "--model", "m@1")
    query = f"SELECT id, f0, f1, f2 FROM {table} WHERE id < 0"
    done = run(*score, "--into", into, "--query", query)
    # Not of a query or a table, since this may be of Parquet.
    assert done.stdout.startswith("there are no rows to predict; ")
    assert f"{into} exists" in done.stdout
    assert tables.run(f"SELECT * FROM {into}") == []
    refused = run(*score, "--into", into, "--query", f"DROP TABLE {table}", status=2).stderr
    assert "the query must be one SELECT; this one begins with 'DROP TABLE" in refused
    assert "no name for a table" in run(*score, "--into", "a;b", "--query", query, status=2).stderr
    assert (
        "no model 'none'"
        in run(
            "score", tables.url, "--model", "none", "--into", into, "--query", query, status=3
        ).stderr
    )


def test_a_table_that_may_be_in_another_database(tmp_path: Path) -> None:
    """A store in SQLite has a file of its own; nothing said how to name the one with the rows."""
    store, rows = f"sqlite:///{tmp_path / 'm.db'}", tmp_path / "rows.db"
    add(store, "m@1")
    sqlite3.connect(rows).execute("CREATE TABLE t (id)").connection.close()
    query = ("--into", "p", "--query", "SELECT id, f0, f1, f2 FROM customers")
    said = run("score", store, "--model", "m@1", *query, status=2).stderr
    assert "no such table: customers; name the database that has it" in said
    assert "--source" in said
    said = run("score", store, "--model", "m@1", *query, "--source", rows, status=2).stderr
    assert said.endswith("no such table: customers\n")
