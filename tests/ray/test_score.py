# SPDX-License-Identifier: Apache-2.0

"""Scoring on Ray: each row once, from and to tables and Parquet, like `Store.score` does it."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pydedup
import pydedup.ray
from pydedup.errors import ArgumentError, ClusterError, MissingStoreError, NotFoundError
from pydedup.ray.cluster import Secret, import_ray
from pydedup.ray.score_plan import QueryPart, Settings
from pydedup.ray.score_worker import hindrance
from pydedup.testing.servers import unused_name
from pydedup.types import ScoreReport

from ..scoring.conftest import Tables
from .conftest import ROWS, Cluster, Scored


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


@pytest.fixture
def parquet(scored_file: Scored, tmp_path: Path) -> Path:
    """The features as two files, a folder below the other, with a column more."""
    columns = {f"f{i}": scored_file.features[:, i] for i in range(3)}
    table = pa.table({"note": ["n"] * ROWS, "id": [3 * i for i in range(ROWS)], **columns})
    (tmp_path / "in" / "more").mkdir(parents=True)
    pq.write_table(table[:900], tmp_path / "in" / "a.parquet", row_group_size=700)
    pq.write_table(table[900:], tmp_path / "in" / "more" / "b.parquet")
    return tmp_path / "in"


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
        for written in (len(keys), 0):
            report = score(
                f"SELECT * FROM {name}",  # noqa: S608
                models,
                f"{name}_p",
                source=url,
                model="m@1",
                part_rows=1,
            )
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


def test_rows_that_cannot_be_predicted(scored_file: Scored, connected: Any) -> None:
    scored_file.run("UPDATE t SET f1 = NULL WHERE id IN (0, 1500, 2400)")
    query = f"{scored_file.query} UNION ALL SELECT NULL, 1.0, 1.0, 1.0"
    with pytest.raises(ArgumentError, match=r"row with id .*(NULL|1500|2400|0)"):
        score(query, scored_file, "p")
    report = score(query, scored_file, "p", on_error="skip")
    assert report.failed == 4
    assert {failure.key for failure in report.failures} == {None, 0, 1500, 2400}
    assert report.rows + report.skipped == ROWS - 3
    assert len(scored_file.predictions("p")) == ROWS - 3


def test_what_is_wrong_is_said_before_work_begins(
    scored_file: Scored, parquet: Path, tmp_path: Path, connected: Any
) -> None:
    query = scored_file.query
    for data, into, options, said in (
        (query, "p", {"workers": 3}, "CPUs for 2 workers of 1, and 3 are asked for"),
        (query, "p", {"cpus_per_worker": 4, "workers": None}, "CPUs for 0 workers of 4"),
        (query, "p", {"workers": 0}, "workers is 0"),
        (query, "p", {"on_error": "no"}, "choose 'fail' or 'skip'"),
        (query, "p", {"key": "nothing"}, "no column 'nothing' for the key"),
        (query, "p", {"columns": ["id"]}, "names its columns itself"),
        (query, "p", {"columns": "id,f0"}, "columns is 'id,f0'; give a list of names"),
        (query, "p", {"columns": []}, "give a list of names"),
        ("DELETE FROM t", "p", {}, "must be one SELECT"),
        ("SELECT id, f0, f1 FROM t", "p", {}, "takes 3 features, and there are 2 columns"),
        ("SELECT f0, f1, f2, id FROM t", "t", {}, "'f0' of table t is not unique"),
        (7, "p", {}, "dataset is a int"),
        ([], "p", {}, "no Parquet file in nothing"),
        (Path("s3://bucket/x"), "p", {}, "s3://bucket/x is in an object store"),
        (["s3://bucket/x"], "p", {}, "let Ray read it, into a table"),
        (query, Path("s3://bucket/x"), {}, "an object store cannot give a file its name"),
    ):
        with pytest.raises(ArgumentError, match=said):
            score(data, scored_file, into, **options)
    with pytest.raises(NotFoundError):
        score(query, scored_file, "p", model="other")
    with pytest.raises(ArgumentError, match="has no column 'f9'; it has: note, id"):
        score(parquet, scored_file, "p", columns=["id", "f9"])
    with pytest.raises(NotFoundError, match="there is no Parquet file"):
        score(tmp_path / "none.parquet", scored_file, "p")
    missing = f"sqlite:///{tmp_path / 'missing.db'}"
    with pytest.raises(MissingStoreError):
        pydedup.ray.score(query, missing, "m", into="p")
    assert not (tmp_path / "missing.db").exists()


@pytest.mark.usefixtures("connected")
def test_a_work_that_could_not_begin_is_not_gone_on_with(
    parquet: Path, scored_file: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hindered it came after the version was noted, on which others then had to stay."""
    out, query = parquet.parent / "out", scored_file.query
    files = {"columns": ["id", "f0", "f1", "f2"]}
    too_many = {"workers": 3}
    for data, into, options in (
        (query, "p", too_many),
        (query, "p", {"model": "m@1"} | too_many),
        (query, out, too_many),
        (parquet, out, files | too_many),
    ):
        with pytest.raises(ArgumentError, match="CPUs for 2 workers"):
            score(data, scored_file, into, **options)
    monkeypatch.setattr(sys.modules["pydedup.ray.score"], "_version", lambda: "9.9")
    for into in ("p", out):
        with pytest.raises(ClusterError, match=r"the Ray worker on .* and 9\.9 here"):
            score(query, scored_file, into)
    with pytest.raises(ArgumentError, match="takes 3 features"):
        score("SELECT id, f0, f1 FROM t", scored_file, "p")
    monkeypatch.undo()
    assert not out.exists()
    with pydedup.open(scored_file.url) as store:
        assert store._adapter.jobs() == []
        store.alias("m", "prod", "2")
    report = score(query, scored_file, "p")
    assert (report.model, report.resumed, report.rows) == ("m@2", False, ROWS)


def settings(url: str, model_id: int = 1) -> Settings:
    return Settings(
        store=Secret(url), source=None, model_id=model_id, address="m@1",
        query="SELECT 1", parts=[QueryPart(None, None)], into="p", folder=None, key="id",
        key_type="", file_key_type=None, columns=["id", "f"], batch=1, memory="64MiB", threads=1,
        on_error="fail",
    )  # fmt: skip


def test_predictions_do_not_go_among_what_is_read(parquet: Path, scored_file: Scored) -> None:
    """A run that was killed could not go on: it read them."""
    with pytest.raises(ArgumentError, match=r"it is in .*/in, of which all Parquet files are read"):
        score(parquet, scored_file, parquet / "more" / "out")
    assert not (parquet / "more" / "out").exists()


@pytest.mark.parametrize("below", ["", "more"])
def test_predictions_do_not_go_into_a_file(
    below: str, parquet: Path, scored_file: Scored, tmp_path: Path
) -> None:
    """It was an error of Python's, of a folder that nobody had named."""
    (tmp_path / "file").touch()
    out = tmp_path / "file" / below
    with pytest.raises(ArgumentError, match=f"cannot go to {out}: .*; name a new folder that can"):
        score(parquet, scored_file, out)


def test_a_refused_first_row_leaves_no_version_noted(scored_file: Scored, connected: Any) -> None:
    """It held its alias until that work came to its end, which it could not."""
    query = scored_file.query.replace("f1", "NULLIF(f1, (SELECT x FROM u)) AS f1")
    scored_file.run("CREATE TABLE u (x REAL)")
    scored_file.run("INSERT INTO u SELECT f1 FROM t WHERE id = 0")
    with pytest.raises(ArgumentError, match="row with id 0: f1 is NULL"):
        score(query, scored_file, "p", part_rows=ROWS)
    with pydedup.open(scored_file.url) as store:
        assert store._adapter.jobs() == []
        store.alias("m", "prod", "2")
    scored_file.run("DELETE FROM u")
    assert score(query, scored_file, "p").model == "m@2"
    # What is written is of one version.
    scored_file.run("INSERT INTO u SELECT f1 FROM t WHERE id = 300")
    with pytest.raises(ArgumentError, match="row with id 300: f1 is NULL"):
        score(query, scored_file, "q", part_rows=ROWS)
    with pydedup.open(scored_file.url) as store:
        store.alias("m", "prod", "1")
    scored_file.run("DELETE FROM u")
    report = score(query, scored_file, "q")
    assert (report.model, report.resumed) == ("m@2", True)


def test_a_machine_without_the_driver_or_the_model_says_so(
    monkeypatch: pytest.MonkeyPatch, scored_file: Scored
) -> None:
    version = pydedup.__version__
    assert hindrance(settings(scored_file.url), version) is None
    assert "m@1 was removed" in str(hindrance(settings(scored_file.url, 77), version))
    assert "and 9.9 here" in str(hindrance(settings(scored_file.url), "9.9"))
    for name in [*sys.modules]:
        if name.partition(".")[0] == "psycopg" or name == "pydedup.adapters.postgres":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    said = str(hindrance(settings("postgresql://me:pa55word@db/x"), version))
    assert "pip install -U 'pydedup[postgres]'" in said
    assert "pa55word" not in said


def test_passwords_are_nowhere(
    postgres_url: str, postgres_schema: str, cluster: Cluster, connected: Any
) -> None:
    name = "p4ssw0rd-of-the-store"
    joined = "&" if "?" in postgres_url else "?"
    at = Scored(f"{postgres_url}{joined}schema={postgres_schema}&password={name}")
    try:
        told = score(at.query, at, "p")
        with pytest.raises(ArgumentError) as raised:
            score(at.query.replace("f0", "f0 / (id - 1500)"), at, "q")
    finally:
        at.run("DROP TABLE IF EXISTS t, p, q")
    assert name not in f"{told}{raised.value}{settings(at.url)}"
    texts = [path for path in Path(cluster.folder).rglob("*") if path.is_file()]
    assert len(texts) > 10
    assert [path for path in texts if name.encode() in path.read_bytes()] == []
