# SPDX-License-Identifier: Apache-2.0
"""A bit that flips in a file of the database, while nobody looks, and not only in what it returns.

PostgreSQL notices with a checksum of its own and refuses to read the page, or to delete it; MariaDB
returns a part of it; SQLite returns it.
"""

from __future__ import annotations

import contextlib
import json
import re
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
from pydedup.errors import ArgumentError, CorruptStoreError, NotFoundError
from pydedup.graph import Graph, Node
from pydedup.testing.mysql_servers import MysqlServer
from pydedup.testing.servers import PostgresServer

from .damage import forget_maps

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
    request.getfixturevalue("of_mariadb")  # MySQL ends itself at such a page
    mysql: MysqlServer = request.getfixturevalue("own_mysql")
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


@pytest.mark.parametrize("slot", [2, 40, 3000])  # it has 2; of other pages there are 40, or not
def test_a_block_map_that_names_a_slot_beyond_its_page(tmp_path: Path, slot: int) -> None:
    rng = np.random.default_rng(0)
    small, large = ({"w": rng.standard_normal((rows, 64))} for rows in (64, 2000))
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        store.add("large", large, policy=policies.Exact())
        store.add("small", small, policy=policies.Exact())
        store.add("other", {"w": small["w"] + 1}, policy=policies.Exact())
        old = store._catalog.model("small").block_map("w")
    slots = old.slots.copy()
    slots[-1] = slot
    (part,) = BlockMap(old.grid, old.dtype, old.page_ids, slots).parts()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE pydedup_block_maps SET payload = ? WHERE model_id = 2", [part])
    forget_maps(f"sqlite:///{path}")
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
    forget_maps(f"sqlite:///{path}")
    with pydedup.open(path) as store:
        with pytest.raises(CorruptStoreError, match="of dtype code"):
            store.load("whole")
        report = store.verify()
        assert {
            "whole@1, tensor 'w': 1 blocks on page 1 are not the source's",
            "whole@1: what it reads is recorded wrongly for pages 1, 2",
        } <= set(report.errors)
        assert report.wrong_readers == [], "its page is kept: it is the block map that is wrong"


NAMES = ("one", "two", "three")


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
        errors = [
            error
            for error in store.verify().errors
            if "was added as two@1" not in error and not error.startswith("alias one@prod")
        ]
        assert [error for error in errors if not error.startswith(said)] == [
            "three@1: its tensors are not those that it was added with; restore a backup"
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
        # A 10 of which a bit has flipped: an add tried to publish without end.
        ("UPDATE pydedup_meta SET value = '00' WHERE name = 'epoch'", "has '00' as its epoch"),
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
    (folder / "tokenizer.json").write_text(f'"{"x" * 12_000}"')  # in rows, of four parts
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
        report = store.verify(evaluate={"accuracy": lambda weights: 1.0})
        assert any("has 'x' as its metric_after; restore" in error for error in report.errors)


def test_damage_is_told_when_its_model_is_to_be_evaluated(tmp_path: Path) -> None:
    """It was an error, and nothing was said of what else is damaged, or of other models."""
    path, model = tmp_path / "store.db", {"w": np.ones((9, 9), np.float32)}
    policy = policies.Accuracy(lambda weights: float(weights["w"].mean()), max_drop=0.1)
    with pydedup.open(path) as store:
        store.add("sound", {"w": 2 * model["w"]}, policy=policy)
        store.add("damaged", model, policy=policy)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE pydedup_pages SET payload = zeroblob(300) WHERE id = 2")
    with pydedup.open(path) as store:
        report = store.verify(evaluate={"damaged": policy.evaluate, "sound": policy.evaluate})
    assert report.damaged_pages == {2: ["damaged@1"]}
    assert report.errors[-1].startswith("damaged cannot be evaluated: page 2: corrupt page")
    assert "sound@1: the metric is 2, as certified" in report.notes


@pytest.mark.parametrize("name", ["none", "exact"])
def test_what_cannot_be_evaluated_is_told_before_all_is_checked(name: str, tmp_path: Path) -> None:
    looked: list[str] = []
    with pydedup.open(tmp_path / "store.db") as store:
        store.add("exact", {"w": np.ones((9, 9), np.float32)}, policy=policies.Exact())
        with pytest.raises((NotFoundError, ArgumentError), match=name):
            store.verify(evaluate={name: len}, progress=lambda stage, *_: looked.append(stage))
    assert looked == []


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
