# SPDX-License-Identifier: Apache-2.0
"""Scoring on Ray that is refused: rows, queries, folders, machines; passwords are nowhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import pydedup
import pydedup.ray
from pydedup.errors import ArgumentError, ClusterError, MissingStoreError, NotFoundError
from pydedup.ray.cluster import Secret
from pydedup.ray.score_plan import QueryPart, Settings
from pydedup.ray.score_worker import hindrance

from .conftest import ROWS, Cluster, Scored
from .test_score import score


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
        (query, "p", {"workers": 0}, "workers must be an integer from 1 to 1,048,576, not 0"),
        (query, "p", {"on_error": "no"}, "choose one of: fail, skip"),
        (query, "p", {"key": "nothing"}, "no column 'nothing' for the key"),
        (query, "p", {"columns": ["id"]}, "names its columns itself"),
        (query, "p", {"columns": "id,f0"}, "columns is 'id,f0'; give a list of names"),
        (query, "p", {"columns": []}, "give a list of names"),
        ("DELETE FROM t", "p", {}, "must be one SELECT"),
        ("SELECT id, f0, f1 FROM t", "p", {}, "takes 3 features, and there are 2 columns"),
        ("SELECT f0, f1, f2, id FROM t", "t", {}, "'f0' of table t is not unique"),
        (7, "p", {}, "dataset is a int"),
        (query, None, {}, "into must be a table's name or the path of a folder, not NoneType"),
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
    assert "pip install 'pydedup[postgres]'" in said
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
