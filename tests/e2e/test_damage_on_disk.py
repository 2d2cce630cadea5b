# SPDX-License-Identifier: Apache-2.0
"""A bit that flips in a file of the database, while nobody looks, and not only in what it returns.

PostgreSQL notices with a checksum of its own and refuses to read the page, or to delete it; MariaDB
returns a part of it; SQLite returns it.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup import policies
from pydedup.blocks import BlockMap
from pydedup.certificates import describe
from pydedup.errors import CorruptStoreError, DuplicateError, NotAStoreError, NotFoundError
from pydedup.graph import Graph, Node
from pydedup.jobs import Job
from pydedup.testing.servers import MariadbServer, PostgresServer

from .damage import put

#: Bytes of a page that are looked for in the files, from where on, and how far on next.
SOUGHT, FIRST, STEP = 100, 300_000, 5000


@dataclass(frozen=True)
class Place:
    """A store whose files can be changed while its database sleeps."""

    url: str
    files: Callable[[], Iterator[Path]]
    sleep: Callable[[], None]
    wake: Callable[[], None]


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "sqlite":
        path = tmp_path / "store.db"
        return Place(f"sqlite:///{path}", lambda: iter([path]), lambda: None, lambda: None)
    if request.param == "postgres":
        postgres: PostgresServer = request.getfixturevalue("own_postgres")
        return Place(
            postgres.new_place(),
            lambda: (path for path in (postgres.folder / "base").rglob("*") if path.is_file()),
            lambda: postgres._control("stop", "-m", "fast"),
            postgres.start,
        )
    mysql: MariadbServer = request.getfixturevalue("own_mysql")
    url = mysql.new_place()
    name = url.partition("?")[0].rpartition("/")[2]
    return Place(url, lambda: (mysql.folder / name).glob("*.ibd"), mysql.stop, mysql.start)


def flip_on_disk(place: Place, payload: bytes) -> None:
    """Flip a bit of a page in the file that it is in."""
    place.sleep()
    try:
        for path in place.files():
            content = path.read_bytes()
            for start in range(FIRST, len(payload), STEP):
                at = content.find(payload[start : start + SOUGHT])
                if at >= 0:
                    with path.open("r+b") as file:
                        file.seek(at)
                        file.write(bytes([content[at] ^ 1]))
                    return
        raise AssertionError("the page is in no file")
    finally:
        place.wake()


def test_a_bit_that_flips_on_disk(place: Place, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    models = {name: {"w": rng.standard_normal((600, 200))} for name in ("mine", "theirs")}
    healthy = f"sqlite:///{tmp_path}/healthy.db"
    for url in (healthy, place.url):
        with pydedup.open(url) as store:
            for name, model in models.items():
                store.add(name, model, policy=policies.Exact())
            page_id = store._adapter.model_pages(store.info("mine").info.id)[0][1]
            ((_, payload),) = store._adapter.read_pages([page_id])
    flip_on_disk(place, payload)

    with pydedup.open(place.url) as store:
        with pytest.raises(CorruptStoreError, match=f"page {page_id}: .*read by mine@1"):
            store.load("mine")
        assert np.array_equal(store.load("theirs")["w"], models["theirs"]["w"])
        assert store.verify().damaged_pages == {page_id: ["mine@1"]}
        report = store.verify(repair_from=healthy)
        assert report.ok
        assert report.repair is not None
        assert report.repair.missing == ()
        for name, model in models.items():
            assert np.array_equal(store.load(name)["w"], model["w"])
        if report.repair.undeleted_pages:
            assert report.repair.undeleted_pages == (page_id,)
            assert "postgres" in place.url
            delete_as_documented(place.url, page_id)
        store.vacuum()
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        for name, model in models.items():
            assert np.array_equal(store.load(name)["w"], model["w"])
        assert store.add("mine", models["mine"]).pages == 0


@pytest.mark.parametrize("slot", [40, 3000])  # of other pages there are as many, or not
def test_a_block_map_that_names_a_slot_beyond_its_page(tmp_path: Path, slot: int) -> None:
    rng = np.random.default_rng(0)
    small, large = ({"w": rng.standard_normal((rows, 64))} for rows in (64, 2000))
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        store.add("large", large, policy=policies.Exact())
        store.add("small", small, policy=policies.Exact())
        store.add("other", {"w": small["w"] + 1}, policy=policies.Exact())
        old = store._catalog.model("small").block_map("w")
    slots = np.full_like(old.slots, slot)
    (part,) = BlockMap(old.grid, old.dtype, old.page_ids, slots).parts()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE pydedup_block_maps SET payload = ? WHERE model_id = 2", [part])
    both = {"w": np.concatenate([large["w"], small["w"]])}
    with pydedup.open(path) as store:
        for work in (
            lambda: store.load("small"),
            lambda: store.explain("small"),
            lambda: store.copy_to(tmp_path / "copy.db", ["small"]),
            store.vacuum,
        ):
            with pytest.raises(CorruptStoreError, match=f"slot {slot} .*run verify"):
                work()
        assert not store.verify().ok
        with contextlib.suppress(CorruptStoreError):
            store.add("small", both)  # looks at the version before
        assert np.array_equal(store.load("large")["w"], large["w"])


def test_a_block_map_that_names_the_same_bytes_of_another_type(tmp_path: Path) -> None:
    """Hashes are of bytes, so these are those of the source."""
    path = tmp_path / "store.db"
    floats = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    with pydedup.open(path) as store:
        store.add("floats", {"w": floats}, policy=policies.Exact())
        store.add("whole", {"w": floats.view(np.int32)}, policy=policies.Exact())
        of, own = (store._catalog.model(name).block_map("w") for name in ("floats", "whole"))
    (part,) = BlockMap(own.grid, own.dtype, of.page_ids, of.slots).parts()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE pydedup_block_maps SET payload = ? WHERE model_id = 2", [part])
    with pydedup.open(path) as store:
        with pytest.raises(CorruptStoreError, match="of dtype code"):
            store.load("whole")
        assert {
            "whole@1, tensor 'w': 1 blocks on page 1 are not the source's",
            "whole@1: what it reads is recorded wrongly for pages 1, 2",
        } <= set(store.verify().errors)


TABLES = {
    "aliases": ["name", "alias", "model_id"],
    "artifacts": ["model_id", "name", "part", "media_type", "payload"],
    "block_maps": ["model_id", "ordinal", "part", "payload"],
    "distinct_blocks": ["hash128", "page_id", "slot", "base_id"],
    "jobs": ["id", "spec", "cursor", "state"],
    "meta": ["name", "value"],
    "model_pages": ["model_id", "page_id", "blocks", "bytes"],
    "models": [
        *("name", "version", "state", "created_at", "policy", "certificate", "metadata"),
        *("logical_bytes", "digest"),
    ],
    "pages": ["state", "retired_at", "checksum", "payload"],
    "signatures": ["segment", "grp", "payload"],
    "source_hashes": ["model_id", "ordinal", "part", "payload"],
    "tensors": ["model_id", "ordinal", "name", "dtype", "shape", "block_shape"],
}


@pytest.mark.parametrize("table", TABLES)
def test_values_that_their_columns_cannot_have(table: str, tmp_path: Path) -> None:
    """SQLite keeps the type of a value beside it, so a flipped bit makes it another."""
    rng = np.random.default_rng(0)
    models = {str(k): {"w": rng.standard_normal((40, 40))} for k in range(2)}
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    path, other = tmp_path / "store.db", tmp_path / "other.db"
    with pydedup.open(path) as store:
        for version, model in models.items():
            store.add("m", model, version=version, metadata={"t": "x"}, graph=graph)
        store.alias("m", "prod", "1")
        with store._adapter.transaction():
            Job(store._adapter, "add").beat()
    wrong = ("x'fffe'", "CAST(x'fffe' AS TEXT)", "'text'", "1.5")
    for number, column in enumerate(TABLES[table]):
        for value in ("NULL", wrong[number % len(wrong)]):
            other.unlink(missing_ok=True)
            shutil.copy(path, other)
            if put(other, f"pydedup_{table}", column, value):
                told = look_at_all(other, models, f"{column} = {value}")
                may_be = value == "NULL" and column in ("base_id", "retired_at")
                may_be |= value == "1.5" and column in ("created_at", "retired_at")
                assert told or may_be or value not in ("NULL", "1.5"), (column, value)


@pytest.mark.parametrize(
    ("column", "value", "where"),
    [
        ("payload", "NULL", "grp = 0"),
        ("payload", "'text'", "grp > 0"),
        ("segment", str((1 << 63) - 1), "grp = 0"),
    ],
)
def test_rows_of_the_index_that_are_damaged_are_left_out(
    column: str, value: str, where: str, tmp_path: Path
) -> None:
    """It is made anew, and nothing of a model depends on it."""
    rng = np.random.default_rng(0)
    models = {name: {"w": rng.standard_normal((40, 40))} for name in ("one", "two")}
    near = {"w": models["one"]["w"] * (1 + 1e-6)}
    path, copy = tmp_path / "store.db", tmp_path / "copy.db"
    with pydedup.open(path) as store:
        store.add_many(models)
    assert put(path, "pydedup_signatures", column, value, where)
    with pydedup.open(path) as store:
        store.backup(tmp_path / "backup.db")
        store.copy_to(copy)
        store.add("near", near)
        store.remove("two")
        store.vacuum()
        for name in ("one", "near"):
            assert np.array_equal(store.load(name)["w"], {**models, "near": near}[name]["w"])
    with pydedup.open(copy) as store:
        assert store.verify().ok
        assert store.add("near", near).delta_blocks == 1


NAMES = ("one", "two", "three")
ROWS = {  # of the second of two models: where its row is, what is said of it, what a repair mends
    "aliases": ("name = 'two'", "model_id", "name 'two', alias 'prod'", False),
    "distinct_blocks": ("id = 2", "hash128", "id 2", True),
    "model_pages": ("model_id = 2", "bytes", "model_id 2, page_id 2", True),
    "models": ("id = 2", "created_at", "id 2, name 'two', version '1'", False),
    "pages": ("id = 2", "checksum", "id 2", True),
    "source_hashes": ("model_id = 2", "payload", "ordinal 0", False),
    "tensors": ("model_id = 2", "shape", "model_id 2, ordinal 0", False),
}


@pytest.mark.parametrize("table", ROWS)
def test_one_row_with_a_value_that_its_column_cannot_have(table: str, tmp_path: Path) -> None:
    """It is told, and all else is verified."""
    where, column, row, is_mended = ROWS[table]
    models = {name: {"w": np.full((9, 9), seed, np.float32)} for seed, name in enumerate(NAMES)}
    path, healthy = tmp_path / "store.db", tmp_path / "healthy.db"
    with pydedup.open(path) as store:
        for name, model in models.items():
            store.add(name, model, policy=policies.Bounded(0.1) if name == "two" else None)
        store.alias("two", "prod", "1")
    shutil.copy(path, healthy)
    assert put(path, f"pydedup_{table}", column, "NULL", where)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE pydedup_tensors SET shape = '[9]' WHERE model_id = 3")
    with pydedup.open(path) as store:
        errors = store.verify().errors
        (said,) = [error for error in errors if error.startswith("column ")]
        assert re.fullmatch(
            f"column {column} of pydedup_{table} has NULL where .* must be, in the row of {row}",
            said,
        )
        other = [error for error in errors if "three@1" in error]
        assert other == [
            "three@1 has tensors of 36 bytes where 324 are recorded: rows of them are missing; "
            "restore a backup"
        ]
        mended = [error for error in store.verify(repair_from=healthy).errors if error not in other]
        assert (mended == []) is is_mended
        for name in ("one", "two") if is_mended else ("one",):
            assert np.array_equal(store.load(name)["w"], models[name]["w"])


@pytest.mark.parametrize(
    ("column", "value"), [("payload", "'text'"), ("payload", "5"), ("checksum", "'text'")]
)
def test_a_page_with_a_value_of_another_type_is_repaired(
    column: str, value: str, tmp_path: Path
) -> None:
    """SQLite refuses to change such a row in any way, which ended repairs and vacuums."""
    models = {name: {"w": np.full((9, 9), seed, np.float32)} for seed, name in enumerate(NAMES)}
    path, healthy = tmp_path / "store.db", tmp_path / "healthy.db"
    with pydedup.open(path) as store:
        for name, model in models.items():
            store.add(name, model)
    shutil.copy(path, healthy)
    assert put(path, "pydedup_pages", column, value, "id = 2")
    with pydedup.open(path) as store:
        assert list(store.verify().damaged_pages.values()) == [["two@1"]]
        assert store.verify(repair_from=healthy).errors == []
        for name, model in models.items():
            assert np.array_equal(store.load(name)["w"], model["w"])
    assert put(path, "pydedup_pages", "payload", "CAST(payload AS TEXT)", "id = 1")
    with pydedup.open(path) as store:
        store.remove("one")
        store.vacuum()
        assert store.verify().errors == []


@pytest.mark.parametrize(("column", "value"), [("created_at", "NULL"), ("metadata", "x'7bff'")])
def test_a_page_is_repaired_beside_a_damaged_row_of_a_model(
    column: str, value: str, tmp_path: Path, change_page: Callable[..., None]
) -> None:
    """A damaged row of a model ended the repair; one that is no UTF-8 ended verify, too."""
    models = {name: {"w": np.full((9, 9), seed, np.float32)} for seed, name in enumerate(NAMES)}
    path, healthy = tmp_path / "store.db", tmp_path / "healthy.db"
    with pydedup.open(path) as store:
        store.add_many(models)  # on one page
        before = store.info("two").info
    shutil.copy(path, healthy)
    text = value if value == "NULL" else f"CAST({value} AS TEXT)"
    assert put(path, "pydedup_models", column, text, "id = 2")
    change_page(f"sqlite:///{path}", 1, lambda payload: payload.__setitem__(-1, payload[-1] ^ 1))
    with pydedup.open(path) as store:
        row = [error for error in store.verify().errors if error.startswith("column ")]
        assert re.fullmatch(f"column {column} .* in the row of id 2, name 'two', version '1'", *row)
        repair = store.verify(repair_from=healthy).repair
        assert repair is not None
        ((page, readers),) = [(one.page, one.models) for one in repair.missing]
        assert (page, readers) == (1, ("the model with id 2",)), "it is kept for that one"
        for name in ("one", "three"):
            assert np.array_equal(store.load(name)["w"], models[name]["w"])
    was = repr(before.created_at) if column == "created_at" else "'{}'"
    assert put(path, "pydedup_models", column, was, "id = 2")
    with pydedup.open(path) as store:
        assert store.verify(repair_from=healthy).errors == []
        assert store.info("two").info == before
        for name, model in models.items():
            assert np.array_equal(store.load(name)["w"], model["w"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "models SET state = 'lively' WHERE id = 2",
            "two@1 is 'lively', a state that no model has, so it is not served; restore a backup",
        ),
        ("artifacts SET payload = x'7b'", "two@1: its 'pydedup:graph.json' is not what"),
        ("models SET name = 't@o' WHERE id = 2", "t@o@1 is damaged: the name 't@o' holds '@'"),
        ("models SET version = '' WHERE id = 2", "two@ is damaged: the version or alias '' is emp"),
        (
            "aliases SET alias = 'prod '",
            "one@prod  is damaged: the version or alias 'prod ' starts or ends with space",
        ),
        ("models SET metadata = '[]' WHERE id = 2", "the metadata of two@1 cannot be read (it is"),
    ],
)
def test_a_state_a_graph_and_names_that_cannot_be(change: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        for name in NAMES:
            graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
            store.add(name, {"w": np.ones((9, 9))}, graph=graph if name == "two" else None)
        store.alias("one", "prod", "1")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE pydedup_{change}")
        connection.execute("UPDATE pydedup_models SET digest = x'00' WHERE id = 3")
    with pydedup.open(path) as store:
        errors = store.verify().errors
        assert [error for error in errors if not error.startswith(said)] == [
            "three@1: its tensors are not those that it was added with"
        ]
        assert len(errors) == 2
        assert np.array_equal(store.load("one")["w"], np.ones((9, 9)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DELETE FROM pydedup_meta WHERE name = 'epoch'", "has None as its epoch"),
        ("UPDATE pydedup_meta SET value = '?' WHERE name = 'epoch'", "has '?' as its epoch"),
        (
            "UPDATE pydedup_meta SET value = '99999999999999999999' WHERE name = 'epoch'",
            "has '99999999999999999999' as its epoch",
        ),
        ("UPDATE pydedup_meta SET value = '[' WHERE name = 'quotas'", "quotas that do not parse"),
    ],
)
def test_what_is_recorded_of_the_store_is_verified(change: str, said: str, tmp_path: Path) -> None:
    """Nothing can be added without it."""
    path, model = tmp_path / "store.db", {"w": np.ones((9, 9))}
    with pydedup.open(path) as store:
        store.add("one", model, metadata={"tenant": "a"})
        store.quotas.set("tenant", "a", "1GB")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(change)
    with pydedup.open(path) as store:
        (error,) = store.verify().errors
        assert said in error
        with pytest.raises(CorruptStoreError, match=re.escape(error)):
            store.add("two", model, metadata={"tenant": "a"})
        assert np.array_equal(store.load("one")["w"], model["w"])


@pytest.mark.parametrize(
    "quota",
    [
        {"key": []},
        {"bytes": None},
        {"bytes": -1},
        {"measure": "?"},
    ],
)
def test_a_quota_that_is_none(quota: dict[str, object], tmp_path: Path) -> None:
    """It was a TypeError of adds, or held as another one."""
    path, model = tmp_path / "store.db", {"w": np.ones((9, 9))}
    with pydedup.open(path) as store:
        store.add("one", model, metadata={"tenant": "a"})
    sound = {"key": "tenant", "value": "a", "bytes": 1000, "measure": "marginal"}
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        added = "INSERT INTO pydedup_meta VALUES ('quotas', ?)"
        connection.execute(added, [json.dumps([sound | quota])])
    with pydedup.open(path) as store:
        (error,) = store.verify().errors
        assert "quotas that do not parse" in error
        with pytest.raises(CorruptStoreError, match="quotas that do not parse"):
            store.add("two", model, metadata={"tenant": "a"})
        assert np.array_equal(store.load("one")["w"], model["w"])


@pytest.mark.parametrize("part", [0, 1])
def test_a_lost_part_of_what_a_model_has_beside_its_weights(part: int, tmp_path: Path) -> None:
    """It is told, and no shorter file is exported."""
    folder, path = tmp_path / "model", tmp_path / "store.db"
    folder.mkdir()
    save_file({"w": np.ones((9, 9), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(f'"{"x" * (5 << 19)}"')  # two parts and a half
    with pydedup.open(path) as store:
        store.add("one", folder)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        lost = "DELETE FROM pydedup_artifacts WHERE name LIKE '%tokenizer.json' AND part = ?"
        assert connection.execute(lost, [part]).rowcount == 1
    with pydedup.open(path) as store:
        (error,) = store.verify().errors
        assert re.search("a part of '.*tokenizer.json' of the model with id 1 is missing", error)
        with pytest.raises(CorruptStoreError, match=re.escape(error)):
            store.export("one", tmp_path / "exported")
        assert np.array_equal(store.load("one")["w"], np.ones((9, 9)))


def look_at_all(path: Path, models: dict[str, dict[str, np.ndarray]], what: str) -> bool:
    """Call all there is of a damaged store: what is given is right, and errors say what is wrong.

    Returns whether opening it, or `verify`, told.
    """
    copy, x = path.with_name("copy.db"), np.ones((1, 40), np.float32)
    calls: list[Callable[[pydedup.Store], object]] = [
        *(pydedup.Store.models, pydedup.Store.stats, pydedup.Store.sizes, pydedup.Store.sharing),
        lambda store: store.stats(by="t"),
        lambda store: store.info("m@1"),
        lambda store: store.explain("m@1"),
        lambda store: store.diff("m@0", "m@1"),
        lambda store: store.predict("m@prod", x),
        lambda store: store.vacuum(dry_run=True),
        lambda store: store.copy_to(copy),
        lambda store: store.add("m", models["1"]),
        lambda store: store.remove("m@0"),
        lambda store: store.vacuum(),
    ]
    told = True
    with contextlib.suppress(CorruptStoreError, NotAStoreError), pydedup.open(path) as store:
        for version, model in models.items():
            with contextlib.suppress(CorruptStoreError, NotFoundError):
                found = store.load(f"m@{version}")
                # A name that is another text is a name; of tensors, verify knows.
                assert [w.tolist() for w in found.values()] == [model["w"].tolist()], what
        with contextlib.suppress(CorruptStoreError):
            told = not store.verify().ok
        for call in calls:
            copy.unlink(missing_ok=True)
            with contextlib.suppress(CorruptStoreError, NotFoundError, DuplicateError):
                call(store)
    return told


@pytest.mark.parametrize("slot", [-1, 1 << 40])
def test_a_slot_that_no_page_has(slot: int, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    model = {"w": np.random.default_rng(0).standard_normal((64, 64))}
    with pydedup.open(path) as store:
        store.add("m", model, policy=policies.Exact())
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE pydedup_distinct_blocks SET slot = ?", [slot])
    with pydedup.open(path) as store:
        assert np.array_equal(store.load("m")["w"], model["w"])
        assert not store.verify().ok
        assert store.add("other", model).damaged_pages == (1,)  # with which nothing is shared
        assert np.array_equal(store.load("other")["w"], model["w"])


@pytest.mark.parametrize("target", ["back.safetensors", "folder"])
def test_an_artifact_that_does_not_parse(target: str, tmp_path: Path) -> None:
    path, source = tmp_path / "store.db", tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}", encoding="utf-8")
    save_file({"w": np.ones((9, 9))}, source / "model.safetensors", {"format": "pt"})
    with pydedup.open(path) as store:
        store.add("m", source / "model.safetensors" if "." in target else source)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "UPDATE pydedup_artifacts SET payload = substr(payload, 2) WHERE name <> 'config.json'"
        )
        # As of a store that has no hashes of them.
        connection.execute("UPDATE pydedup_models SET certificate = '{}'")
    with pydedup.open(path) as store:
        with pytest.raises(CorruptStoreError, match=r"artifact 'pydedup:.*' of the .* damaged"):
            store.export("m", tmp_path / target)
        assert not (tmp_path / "back.safetensors").exists()
        store.export("m", tmp_path / "other.npz")


def test_a_certificate_of_other_names(tmp_path: Path) -> None:
    """It is JSON all the same; what it cannot say is told, and all else of the model."""
    path, model = tmp_path / "store.db", {"w": np.ones((9, 9), np.float32)}
    with pydedup.open(path) as store:
        store.add("bounded", model, policy=policies.Bounded(0.01))
        store.add("accuracy", model, policy=policies.Accuracy(lambda weights: 1.0, max_drop=0.1))
    for name in ("max_rel_error", "largest_block_error", "metric_after", "evaluations"):
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(
                "UPDATE pydedup_models SET certificate = replace(certificate, ?, ?)",
                [f'"{name}": ', f'"{name}": "x", "": '],
            )
    with pydedup.open(path) as store:
        for address in ("bounded", "accuracy"):
            (said,) = describe(store.info(address).certificate)
            assert "is damaged" in said
            assert np.array_equal(store.load(address)["w"], model["w"])
        with pytest.raises(CorruptStoreError, match="has 'x' as its metric_after; restore"):
            store.verify(evaluate={"accuracy": lambda weights: 1.0})


@pytest.mark.parametrize(
    ("errors", "said"), [("5", "5 as its tensor_e"), ('{"w": []}', r"\[\] as its w")]
)
def test_errors_of_tensors_that_are_none(errors: str, said: str, tmp_path: Path) -> None:
    path, model = tmp_path / "store.db", {"w": np.ones((9, 9), np.float32)}
    with pydedup.open(path) as store:
        store.add("m", model, policy=policies.Bounded(0.01))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "UPDATE pydedup_models SET certificate = json_set(certificate, '$.tensor_errors', "
            "json(?))",
            [errors],
        )
    with pydedup.open(path) as store:
        assert np.array_equal(store.load("m")["w"], model["w"])
        with pytest.raises(CorruptStoreError, match=rf"certificate is damaged: it has {said}"):
            store.explain("m")


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_schema_that_is_no_text(mode: str, tmp_path: Path) -> None:
    """What SQLite says of it is none either, which Python's module refuses to tell."""
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        store.add("m", {"w": np.ones(9)})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"CREATE TABLE pydedup_m", b"CREATE T\xffBLE pydedup_m"))
    with pytest.raises(CorruptStoreError, match=r"near \"T\ufffdBLE\": syntax error; .*backup"):
        pydedup.open(path, mode=mode)


def delete_as_documented(url: str, page_id: int) -> None:
    """Run what docs/faults.md tells a superuser."""
    import psycopg

    text = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    server, _, schema = url.partition("schema=")
    with psycopg.connect(server.rstrip("?&"), autocommit=True) as connection:
        statements = [line.strip() for line in text.splitlines() if line.startswith("    ")]
        assert len(statements) == 4
        for statement in statements:
            sql = statement.replace("pydedup.", f"{schema}.").replace("= 3;", f"= {page_id};")
            connection.execute(sql)  # type: ignore[call-overload]
