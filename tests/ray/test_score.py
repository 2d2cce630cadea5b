# SPDX-License-Identifier: Apache-2.0

"""Scoring on Ray: each row once, from and to tables and Parquet, like `Store.score` does it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pydedup
import pydedup.ray
from pydedup.errors import ArgumentError, NotFoundError
from pydedup.ray.cluster import import_ray
from pydedup.testing.servers import unused_name
from pydedup.types import ScoreReport

from ..scoring.conftest import Tables
from .conftest import ROWS, Scored


def score(data: Any, at: Scored, into: Any, **options: Any) -> ScoreReport:
    options = {"workers": 1, "part_rows": 300, "batch": 64} | options
    return pydedup.ray.score(data, at.url, options.pop("model", "m@prod"), into=into, **options)


def of_folder(folder: Path) -> dict[Any, float]:
    table = pq.read_table(folder)
    assert set(table["model"].to_pylist()) == {"m@1"}
    keys = table["id"].to_pylist()
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, table["prediction"].to_pylist(), strict=True))


def assert_right(found: dict[Any, float], at: Scored) -> None:
    assert sorted(found) == [3 * i for i in range(ROWS)]
    got = [found[3 * i] for i in range(ROWS)]
    np.testing.assert_allclose(got, at.wanted(), rtol=1e-5, atol=1e-6)


def test_a_table_is_scored_like_store_score_does(scored: Scored, connected: Any) -> None:
    told: list[tuple[str, int, int]] = []
    report = score(scored.query, scored, "p", workers=2, progress=lambda *one: told.append(one))
    assert (report.model, report.rows, report.skipped, report.failed) == ("m@1", ROWS, 0, 0)
    assert not report.resumed
    assert told[-1][:2] == ("scoring", ROWS)
    assert len(told) >= ROWS // 300
    assert_right(scored.predictions("p"), scored)
    assert scored.run("SELECT DISTINCT model FROM p") == [("m@1",)]
    with pydedup.open(scored.url) as store:
        assert store._adapter.jobs() == []
        assert store.score(scored.query, "m@prod", into="p").skipped == ROWS


def test_parquet_becomes_parquet_once(parquet: Path, scored_file: Scored, connected: Any) -> None:
    out, columns = parquet.parent / "out", ["id", "f0", "f1", "f2"]
    report = score(parquet, scored_file, out, columns=columns, workers=2)
    assert (report.rows, report.failed, report.table) == (ROWS, 0, str(out))
    assert_right(of_folder(out), scored_file)
    schema = pq.read_schema(next(out.glob("*.parquet")))
    assert (schema.names, schema.field("id").type) == (["id", "prediction", "model"], pa.int64())
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    # One part lost its mark, another all: what is done is not done again, and names stay.
    (out / "_pydedup" / "done-00001.json").unlink()
    (out / "_pydedup" / "done-00002.json").unlink()
    (out / "part-00002.parquet").unlink()
    (out / ".part-00002.parquet.x.tmp").touch()
    with pydedup.open(scored_file.url) as store:
        store.alias("m", "prod", "2")
    again = score(parquet, scored_file, out, columns=columns)
    assert again.resumed
    assert 0 < again.rows <= 2 * 300
    assert again.rows + again.skipped == ROWS
    assert_right(of_folder(out), scored_file)
    same = [path for path in before if path.stat().st_mtime_ns == before[path]]
    assert len(same) == len(before) - 2
    assert not list(out.glob(".*"))
    with pytest.raises(ArgumentError, match="predictions of another work"):
        score(scored_file.query, scored_file, out)
    with pytest.raises(ArgumentError, match="is not empty and holds no predictions of ours"):
        score(parquet, scored_file, parquet, columns=columns)
    with pytest.raises(ArgumentError, match="predictions of another work"):
        score(parquet / "a.parquet", scored_file, out, columns=columns)


class _StopError(Exception):
    pass


def _interrupted(data: Any, at: Scored, into: Any, **options: Any) -> None:
    """Begin a scoring, and end it when some rows are done."""

    def stop(stage: str, done: int, total: int) -> None:
        if done >= 600:
            raise _StopError

    with pytest.raises(_StopError):
        score(data, at, into, progress=stop, **options)


@pytest.mark.parametrize("data", ["query", "files"])
@pytest.mark.parametrize("change", ["DROP TABLE p", "DELETE FROM p"])
def test_predictions_that_are_taken_away_are_made_again(
    data: str, change: str, parquet: Path, scored_file: Scored, connected: Any
) -> None:
    """Parts noted as done were left out, although nothing was there of them any more."""
    files, columns = data == "files", ["id", "f0", "f1", "f2"]
    dataset: Any = parquet if files else scored_file.query
    options = {"columns": columns if files else None}
    _interrupted(dataset, scored_file, "p", **options)
    scored_file.run(change)
    report = score(dataset, scored_file, "p", **options)
    assert (report.resumed, report.rows) == (True, ROWS)
    assert_right(scored_file.predictions(), scored_file)


def test_a_file_of_predictions_that_is_taken_away_is_made_again(
    scored_file: Scored, tmp_path: Path, connected: Any
) -> None:
    out = tmp_path / "out"
    score(scored_file.query, scored_file, out)
    sorted(out.glob("*.parquet"))[1].unlink()
    assert 0 < score(scored_file.query, scored_file, out).rows <= 300
    assert_right(of_folder(out), scored_file)


def test_what_killed_runs_had_begun_to_write_is_removed(
    scored_file: Scored, tmp_path: Path, connected: Any
) -> None:
    """Of notes it stayed for good."""
    out = tmp_path / "out"
    pydedup.ray.score(scored_file.query, scored_file.url, "m@1", into=out)
    there = sorted(out.rglob("*"))
    for name in (".part-00000.parquet.0815.tmp", "_pydedup/.0815.tmp"):
        (out / name).write_text("")
    pydedup.ray.score(scored_file.query, scored_file.url, "m@1", into=out)
    assert sorted(out.rglob("*")) == there


def test_queries_that_differ_in_blanks_are_not_one_work(
    scored_file: Scored, connected: Any
) -> None:
    """Those of a text mean something: parts of the one were taken for done in the other."""
    scored_file.run("ALTER TABLE t ADD COLUMN name TEXT")
    scored_file.run("UPDATE t SET name = CASE WHEN id % 2 = 0 THEN 'a b' ELSE 'a  b' END")
    _interrupted(f"{scored_file.query} WHERE name = 'a b'", scored_file, "p")
    for name in ("a  b", "a b"):
        score(f"{scored_file.query} WHERE name = '{name}'", scored_file, "p")
    assert_right(scored_file.predictions(), scored_file)


@pytest.mark.parametrize(
    ("backend", "kind", "keys"),
    [
        ("postgres", "inet", ["10.0.0.1", "10.0.0.0/8", "::1", "10.0.0.2"]),
        ("postgres", "time", ["10:00", "00:00", "10:00:00.000001", "09:00"]),
        ("postgres", "float8", ["-Infinity", "0.1", "Infinity", "NaN"]),
        ("mysql", "TIME(6)", ["-01:00:00", "25:00:00.000001", "00:00:00", "-00:00:00.5"]),
    ],
)
def test_work_is_cut_by_keys_of_any_type(
    backend: str, kind: str, keys: list[str], request: pytest.FixtureRequest, connected: Any
) -> None:
    """Those that Python has as times of day, spans, addresses or no finite number were refused."""
    url = request.getfixturevalue(f"{backend}_{'url' if backend == 'postgres' else 'database'}")
    models = request.getfixturevalue("scored_file")
    at, name = Tables(url), unused_name().replace("pydedup", "t")
    at.run(f"CREATE TABLE {name} (id {kind}, a FLOAT, b FLOAT, c FLOAT)")
    try:
        at.run(f"CREATE TABLE {name}_p (id {kind} PRIMARY KEY, prediction FLOAT)")
        at.run(f"INSERT INTO {name} VALUES (?, 1, 2, 3)", [[key] for key in keys])  # noqa: S608
        query, into = f"SELECT * FROM {name}", f"{name}_p"  # noqa: S608
        for written in (len(keys), 0):
            report = score(query, models, into, source=url, model="m@1", part_rows=1)
            assert (report.rows, report.skipped) == (written, len(keys) - written)
        joined = f"SELECT COUNT(*) FROM {name} JOIN {name}_p USING (id)"  # noqa: S608
        assert at.run(joined) == [(len(keys),)]
    finally:
        at.run(f"DROP TABLE IF EXISTS {name}, {name}_p")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("ARRAY[n]", "of type list, by which the work cannot be divided"),
        (
            "CASE WHEN n < 3 THEN to_jsonb(n) ELSE jsonb_build_object('n', n) END",
            "of type dict, by which the work cannot be divided",
        ),
        ("to_jsonb(n)", "'id' of the query has a type that can be no key"),
    ],
)
def test_keys_that_work_cannot_be_cut_by_are_told(
    key: str, said: str, postgres_url: str, scored_file: Scored, connected: Any
) -> None:
    """Of those in JSON one was an error of Python's, and another of the SQL that we wrote."""
    query = f"SELECT {key} AS id, 1 AS a, 2 AS b, 3 AS c FROM generate_series(1, 9) n"  # noqa: S608
    with pytest.raises(ArgumentError, match=said):
        score(query, scored_file, "p", source=postgres_url, part_rows=2)


def test_a_folder_is_of_one_source(scored_file: Scored, tmp_path: Path, connected: Any) -> None:
    """Another one's rows were said to be there."""
    score(scored_file.query, scored_file, tmp_path / "out")
    other = Scored(f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(ArgumentError, match="predictions of another work"):
        score(scored_file.query, scored_file, tmp_path / "out", source=other.url)


@pytest.mark.parametrize("into", ["table", "folder"])
def test_files_and_row_groups_may_be_empty(
    into: str, parquet: Path, scored_file: Scored, connected: Any
) -> None:
    """With one among them, or nothing else, files were "not those that the work began with"."""
    columns = ["id", "f0", "f1", "f2"]
    empty = parquet.parent / "empty.parquet"
    pq.write_table(pq.read_table(parquet / "a.parquet")[:0], empty)
    targets: list[Any] = ["p", "q"]
    if into == "folder":
        targets = [parquet.parent / name for name in targets]
    report = score([empty, parquet], scored_file, targets[0], columns=columns)
    assert report.rows == ROWS
    assert score(empty, scored_file, targets[1], columns=columns).rows == 0
    if into == "folder":
        assert_right(of_folder(targets[0]), scored_file)
    else:
        assert_right(scored_file.predictions("p"), scored_file)
        assert scored_file.predictions("q") == {}


@pytest.mark.parametrize("into", ["table", "folder"])
def test_a_version_that_is_removed_under_the_work_is_told(
    into: str, scored_file: Scored, tmp_path: Path, connected: Any
) -> None:
    target: Any = "p" if into == "table" else tmp_path / "out"

    def remove(stage: str, done: int, total: int) -> None:
        with pydedup.open(scored_file.url) as store, contextlib.suppress(NotFoundError):
            store.alias("m", "prod", "2")
            store.remove("m@1")

    stays = r"\S*p\b" if into == "table" else re.escape(str(target))
    said = f"m@1 was removed while rows were scored with it; what was scored stays in {stays}. Name"
    with pytest.raises(NotFoundError, match=said) as raised:
        score(scored_file.query, scored_file, target, part_rows=50, progress=remove)
    assert ("and a new folder" in str(raised.value)) == (into == "folder")
    found = scored_file.predictions() if into == "table" else of_folder(target)
    assert 0 < len(found) < ROWS
    if into == "table":
        report = score(scored_file.query, scored_file, target, model="m@2")
        assert report.rows + report.skipped == ROWS
        assert report.skipped == len(found)


def test_a_query_becomes_parquet(scored_file: Scored, tmp_path: Path, connected: Any) -> None:
    with pydedup.open(scored_file.url) as store:
        before = store.stats()
    score(scored_file.query, scored_file, tmp_path / "out")
    assert_right(of_folder(tmp_path / "out"), scored_file)
    with pydedup.open(scored_file.url) as store:
        assert store.stats() == before
    assert scored_file.run("SELECT COUNT(*) FROM sqlite_master WHERE name = 'p'") == [(0,)]


def test_parquet_and_datasets_become_tables(
    parquet: Path, scored_file: Scored, connected: Any
) -> None:
    columns = ["id", "f0", "f1", "f2"]
    files = [parquet / "a.parquet", parquet / "more"]
    score(files, scored_file, "p", columns=columns, workers=2)
    assert_right(scored_file.predictions("p"), scored_file)
    paths = [str(path) for path in parquet.rglob("*.parquet")]
    dataset = import_ray("ray.data").read_parquet(paths)
    report = score(dataset, scored_file, "q", key="id", columns=columns)
    assert report.rows == ROWS
    assert_right(scored_file.predictions("q"), scored_file)
    with pytest.raises(ArgumentError, match="has no parts that are the same"):
        score(dataset, scored_file, parquet.parent / "out")
    with pytest.raises(ArgumentError, match="CPUs for 1 workers of 1 beside one that reads"):
        score(dataset, scored_file, "q", key="id", columns=columns, workers=2)
