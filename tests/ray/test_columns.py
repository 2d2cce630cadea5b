# SPDX-License-Identifier: Apache-2.0

"""Scoring on Ray: what columns of Parquet files and of datasets may be."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pydedup.ray
from pydedup.errors import ArgumentError, StorageFullError
from pydedup.ray.cluster import import_ray
from pydedup.testing.disks import SmallDisk
from pydedup.types import ScoreReport

from ..scoring.conftest import Tables, add
from .conftest import ROWS as MANY
from .conftest import Scored

ROWS = 30


def score(data: Any, url: str, into: Any, **options: Any) -> ScoreReport:
    return pydedup.ray.score(data, url, "m@1", into=into, workers=1, batch=10, **options)


def table_of(at: Scored, keys: Any) -> pa.Table:
    return pa.table({"id": keys} | {f"f{i}": at.features[:ROWS, i] for i in range(3)})


def written(folder: Path, table: pa.Table) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "rows.parquet", row_group_size=12)
    return folder / "rows.parquet"


def test_of_parquet_to_parquet_keys_may_repeat(
    scored_file: Scored, tmp_path: Path, connected: Any
) -> None:
    """Those of one batch were refused."""
    table = table_of(scored_file, [n // 10 for n in range(ROWS)])
    features = table["f1"].to_pylist()
    features[5] = None
    table = table.set_column(2, "f1", pa.array(features, pa.float32()))
    out = tmp_path / "out"
    report = score(written(tmp_path / "in", table), scored_file.url, out, on_error="skip")
    assert (report.rows, report.failed) == (ROWS - 1, 1)
    (failure,) = report.failures
    assert (failure.key, failure.reason) == (0, "f1 is NULL")
    found = pq.read_table(out)
    assert found["id"].to_pylist() == [n // 10 for n in range(ROWS) if n != 5]
    wanted = np.delete(scored_file.wanted()[:ROWS], 5)
    np.testing.assert_allclose(found["prediction"].to_numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_a_file_that_was_put_right_is_scored_on(
    scored_file: Scored, tmp_path: Path, connected: Any
) -> None:
    """The run that told of its row met it as "not what it was when the work began", for ever."""
    table = table_of(scored_file, list(range(ROWS)))
    broken = table["f1"].to_pylist()
    broken[-1] = None
    batch = "nothing of this batch was written, what is of others stays"
    part = "nothing of its part was kept, what is of other parts is"
    into: Any
    for number, (into, kept) in enumerate((("p", batch), (tmp_path / "out", part))):
        data = written(tmp_path / str(number), table.set_column(2, "f1", pa.array(broken)))
        with pytest.raises(ArgumentError, match=f"row with id {ROWS - 1}: f1 is NULL; {kept}"):
            score(data, scored_file.url, into)
        written(data.parent, table)
        if into != "p":
            with pytest.raises(ArgumentError, match=r"of another work .*; name a new folder"):
                score(data, scored_file.url, into)
            continue
        report = score(data, scored_file.url, into)
        assert report.rows > 0
        assert report.rows + report.skipped == ROWS
        found = scored_file.predictions()
        wanted = scored_file.wanted()[:ROWS]
        np.testing.assert_allclose([found[n] for n in range(ROWS)], wanted, rtol=1e-5, atol=1e-6)


def test_wide_predictions_are_written_as_they_come(
    scored_file: Scored, tmp_path: Path, connected: Any
) -> None:
    """A part of them, up to gigabytes, was in memory until it was complete."""
    weights = add(scored_file.url, "m@3", outputs=5000)
    options = {"into": tmp_path / "out", "workers": 1, "batch": 100}
    report = pydedup.ray.score(scored_file.query, scored_file.url, "m@3", **options)
    assert report.rows == MANY
    seen: list[int] = []
    with pq.ParquetFile(tmp_path / "out" / "part-00000.parquet") as file:  # 38 MiB
        for number in range(file.num_row_groups):
            group = file.read_row_group(number)
            assert group.nbytes < 36 << 20
            seen += group["id"].to_pylist()
            got = group["prediction"].combine_chunks().flatten().to_numpy().reshape(-1, 5000)
            wanted = scored_file.features[group["id"].to_numpy() // 3] @ weights.T
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert sorted(seen) == [3 * n for n in range(MANY)]


def test_a_disk_that_is_full_is_told_as_that(
    scored_file: Scored, new_disk: Callable[[Path, int], SmallDisk], tmp_path: Path, connected: Any
) -> None:
    """As "a Ray worker failed: OSError"; with room again, the same command goes on."""
    add(scored_file.url, "m@3", outputs=2000)
    disk = new_disk(tmp_path / "disk", 4)
    out = disk.folder / "out"
    with pytest.raises(StorageFullError, match=f"no space left for predictions in {out}"):
        pydedup.ray.score(scored_file.query, scored_file.url, "m@3", into=out, workers=1)
    assert list(out.glob("*part*")) == []
    disk.remount("size=64m")
    report = pydedup.ray.score(scored_file.query, scored_file.url, "m@3", into=out, workers=1)
    assert (report.rows, report.resumed) == (MANY, True)


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_disk_that_is_full_before_work_begins_is_left_as_it_was(
    blocks: int,
    scored_file: Scored,
    new_disk: Callable[[Path, int], SmallDisk],
    tmp_path: Path,
    connected: Any,
) -> None:
    """Of notes that had no room, empty files stayed for good; it was said of what is printed."""
    disk = new_disk(tmp_path / "disk", 1)
    out, ballast = disk.folder / "out", disk.folder / "ballast"
    ballast.write_bytes(bytes((1 << 20) - 4096 * blocks))
    with pytest.raises(StorageFullError, match=f"no space left for predictions in {out}"):
        pydedup.ray.score(scored_file.query, scored_file.url, "m@1", into=out, workers=1)
    assert list(disk.folder.iterdir()) == [ballast]


def test_keys_in_nanoseconds(scored_file: Scored, tmp_path: Path, connected: Any) -> None:
    """As pandas writes them; SQLite was given what its driver does not take."""
    begun = dt.datetime(2024, 1, 1)
    keys = pa.array([begun + dt.timedelta(seconds=n) for n in range(ROWS)], pa.timestamp("ns"))
    data = written(tmp_path / "in", table_of(scored_file, keys))
    assert score(data, scored_file.url, "p").rows == ROWS
    assert score(data, scored_file.url, "p").skipped == ROWS
    assert (str(begun),) in scored_file.run("SELECT id FROM p")
    finer = pa.array(range(ROWS), pa.int64()).cast(pa.timestamp("ns"))
    data = written(tmp_path / "finer", table_of(scored_file, finer))
    with pytest.raises(ArgumentError, match="keys 'id' differ in nanoseconds"):
        score(data, scored_file.url, "q")
    assert score(data, scored_file.url, tmp_path / "out").rows == ROWS
    assert pq.read_table(tmp_path / "out")["id"].combine_chunks().equals(finer)


def test_times_of_day_in_nanoseconds(scored_file: Scored, tmp_path: Path, connected: Any) -> None:
    """Those that Python has not were written to Parquet without them."""
    seconds = [n * 10**9 for n in range(ROWS)]
    keys = pa.array(seconds, pa.time64("ns"))
    data = written(tmp_path / "in", table_of(scored_file, keys))
    assert score(data, scored_file.url, tmp_path / "out").rows == ROWS
    assert pq.read_table(tmp_path / "out")["id"].combine_chunks().equals(keys)
    finer = pa.array([n + 1 for n in seconds], pa.time64("ns"))
    data = written(tmp_path / "finer", table_of(scored_file, finer))
    with pytest.raises(ArgumentError, match="keys 'id' differ in nanoseconds"):
        score(data, scored_file.url, tmp_path / "none")


def test_instants_are_keys_in_postgresql(
    postgres_url: str, postgres_schema: str, scored_file: Scored, tmp_path: Path, connected: Any
) -> None:
    """Without their zone, those of an hour that the clock shows twice were taken for others."""
    options = f"options=-c%20timezone%3DEurope/Berlin&schema={postgres_schema}"
    url = f"{postgres_url}{'&' if '?' in postgres_url else '?'}{options}"
    add(url, "m@1", seed=1)
    begun = dt.datetime(2024, 10, 27, tzinfo=dt.UTC)
    instants = [begun + dt.timedelta(minutes=10 * n) for n in range(ROWS)]
    keys = pa.array(instants, pa.timestamp("us", "UTC"))
    data = written(tmp_path / "in", table_of(scored_file, keys))
    into = postgres_schema.replace("pydedup", "p")
    try:
        assert score(data, url, into).rows == ROWS
        assert score(data, url, into).skipped == ROWS
        found = Tables(url).run(f"SELECT id FROM {into}")  # noqa: S608 (made here)
        assert {key.astimezone(dt.UTC) for (key,) in found} == set(instants)
    finally:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f"DROP TABLE IF EXISTS {into}".encode())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (pa.array([2**64 - 1 - n for n in range(ROWS)], pa.uint64()), "beyond what the database"),
        (pa.array([Decimal(n) / 4 for n in range(ROWS)], pa.decimal128(9, 2)), "can be no key"),
    ],
)
def test_keys_that_sqlite_lacks_are_told(
    keys: Any, said: str, scored_file: Scored, tmp_path: Path, connected: Any
) -> None:
    data = written(tmp_path / "in", table_of(scored_file, keys))
    with pytest.raises(ArgumentError, match=said):
        score(data, scored_file.url, "p")
    assert score(data, scored_file.url, tmp_path / "out").rows == ROWS
    assert pq.read_table(tmp_path / "out")["id"].combine_chunks().equals(keys)


@pytest.mark.parametrize("kind", [pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_are_keys_of_tables_however_they_are_written(
    kind: Any, scored_file: Scored, tmp_path: Path, connected: Any
) -> None:
    """As categories of pandas, and by Rust's programs: they were told to be cast to a text."""
    keys = pa.array([f"k{n:02}" for n in range(ROWS)]).cast(kind)
    data = written(tmp_path / "in", table_of(scored_file, keys))
    assert score(data, scored_file.url, "p").rows == ROWS
    found = scored_file.predictions()
    wanted = scored_file.wanted()[:ROWS]
    np.testing.assert_allclose([found[f"k{n:02}"] for n in range(ROWS)], wanted, rtol=1e-5)


def test_values_that_python_lacks_are_told(
    scored_file: Scored, tmp_path: Path, connected: Any
) -> None:
    """As "a Ray worker failed: OverflowError"."""
    keys = pa.array([10**7 + n for n in range(ROWS)], pa.int32()).cast(pa.date32())
    data = written(tmp_path / "in", table_of(scored_file, keys))
    with pytest.raises(
        ArgumentError, match="column 'id' has a value that Python does not have, such as"
    ):
        score(data, scored_file.url, tmp_path / "out")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Use 'expr'")
def test_blocks_without_rows_or_with_tensors(scored_file: Scored, connected: Any) -> None:
    """Those that a filter empties have no columns, and what numpy gives is a column of tensors."""
    features = scored_file.features

    def rows(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": 3 * row["id"], "x": features[row["id"]]}

    numbers = import_ray("ray.data").range(ROWS, override_num_blocks=5)
    dataset = numbers.filter(lambda row: row["id"] >= 25).map(rows)
    assert score(dataset, scored_file.url, "p", columns=["id", "x"]).rows == 5
    found = scored_file.predictions()
    assert sorted(found) == [3 * n for n in range(25, ROWS)]
    wanted = scored_file.wanted()[25:ROWS]
    np.testing.assert_allclose([found[key] for key in sorted(found)], wanted, rtol=1e-5, atol=1e-6)
    none = numbers.filter(lambda row: row["id"] > ROWS).map(rows)
    assert score(none, scored_file.url, "p", columns=["id", "x"]).rows == 0
    with pytest.raises(ArgumentError, match="no row of the dataset was predicted, and so table q"):
        score(none, scored_file.url, "q", columns=["id", "x"])
    with pytest.raises(ArgumentError, match="a block of the dataset has no column 'none'"):
        score(dataset, scored_file.url, "r", columns=["id", "none"])
