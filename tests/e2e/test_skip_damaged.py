# SPDX-License-Identifier: Apache-2.0
"""Copies and backups of a store in which a model is damaged: told, or all others are taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.cli.app import main
from pydedup.errors import CorruptStoreError
from pydedup.graph import Graph, Node

from .damage import change, put

NAMES = ("one", "two", "three")
MODELS = {
    name: {"w": np.random.default_rng(seed).standard_normal((128, 64), np.float32)}
    for seed, name in enumerate(NAMES)
}
GRAPH = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
#: What is damaged of the model two.
DAMAGES = [
    "DELETE FROM {block_maps} WHERE model_id = 2",
    "DELETE FROM {tensors} WHERE model_id = 2",
    "DELETE FROM {pages} WHERE id = 2",
    "UPDATE {pages} SET payload = substr(payload, 1, 9000) WHERE id = 2",
    "DELETE FROM {distinct_blocks} WHERE page_id = 2 AND slot = 0",
    "DELETE FROM {source_hashes} WHERE model_id = 2",
    "UPDATE {artifacts} SET part = 1 WHERE model_id = 2",
    "DELETE FROM {models} WHERE id = 2",
    "UPDATE {models} SET created_at = -1 WHERE id = 2",
    'UPDATE {models} SET metadata = \'{"tenant": "b"}\' WHERE id = 2',
    "UPDATE {models} SET policy = 'exact' WHERE id = 2",
    "UPDATE {models} SET certificate = substr(certificate, 1, 9) WHERE id = 2",
]


def fill(url: str) -> None:
    with pydedup.open(url) as store:
        for name, model in MODELS.items():
            store.add(name, model, graph=GRAPH)
        store.alias("one", "prod", "1")
        store.quotas.set("tenant", "a", "1GB")


def holds_others(url: str | Path) -> None:
    with pydedup.open(url, mode="r") as store:
        assert [info.address for info in store.models()] == ["one@1", "three@1"]
        for name in ("one", "three", "one@prod"):
            assert np.array_equal(store.load(name)["w"], MODELS[name.partition("@")[0]]["w"])
        assert store.verify().errors == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_but_a_damaged_model_is_taken(
    damage: str, store_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store_url)
    change(store_url, damage)
    copy, backup = tmp_path / "copy.db", tmp_path / "backup.db"
    for command in (["copy", store_url, str(copy)], ["backup", store_url, str(backup)]):
        assert main([*command, "-q"]) == 4
        assert "(--skip-damaged) leaves out what is damaged" in capsys.readouterr().err
        assert not backup.exists()
        assert main([*command, "--skip-damaged", "--json", "-q"]) == 1
        out, err = capsys.readouterr()
        (said,) = json.loads(out)["damaged"]
        assert "two@1" in said or "model with id 2" in said
        assert "left out, being damaged: " in err
        holds_others(command[-1])
    with pydedup.open(backup, mode="r") as store:
        assert [quota.value for quota in store.quotas] == ["a"]
    # Into a store that has models, too.
    target = tmp_path / "target.db"
    with pydedup.open(target) as store:
        store.add("far", {"w": np.ones((3, 5))})
        store.quotas.set("tenant", None, "1GB")
    with pydedup.open(store_url) as store:
        report = store.copy_to(target, skip_damaged=True)
        assert len(report.damaged) == 1
        assert report.copied == 2


def test_a_model_beside_deltas_on_a_damaged_page_is_taken(store_url: str, tmp_path: Path) -> None:
    """It was called damaged: its page was to go whole, with blocks of others that are.

    What was damaged was said once for each model that reads it.
    """
    near = {"w": MODELS["one"]["w"] * np.float32(1 + 1e-6)}
    with pydedup.open(store_url) as store:
        store.add("base", MODELS["one"])
        reports = store.add_many({"small": MODELS["two"], "near": near})
        assert [report.delta_blocks > 0 for report in reports] == [False, True]
        assert store.stats().pages == 2
    change(store_url, "UPDATE {pages} SET payload = substr(payload, 1, 9000) WHERE id = 1")
    with pydedup.open(store_url) as store:
        report = store.copy_to(tmp_path / "copy.db", skip_damaged=True)
        (said,) = report.damaged
        assert "read by base@1, near@1;" in said
        assert [model.status for model in report.models] == ["damaged", "copied", "damaged"]
    with pydedup.open(tmp_path / "copy.db") as store:
        assert [info.name for info in store.models()] == ["small"]
        assert np.array_equal(store.load("small")["w"], MODELS["two"]["w"])
        assert store.verify().ok


def test_damaged_quotas_are_not_carried(tmp_path: Path) -> None:
    """They were, into a backup in the place of a sound one: none was left to restore them from."""
    path, backup = tmp_path / "store.db", tmp_path / "backup.db"
    fill(f"sqlite:///{path}")
    with pydedup.open(path) as store:
        store.backup(backup)
        before = backup.read_bytes()
        change(f"sqlite:///{path}", "UPDATE {meta} SET value = '[{' WHERE name = 'quotas'")
        told = r"quotas that do not parse .*\(--skip-damaged\) leaves out"
        with pytest.raises(CorruptStoreError, match=told):
            store.backup(backup, replace=True)
        assert backup.read_bytes() == before
        report = store.backup(tmp_path / "other.db", skip_damaged=True)
        assert ["quotas that do not parse" in said for said in report.damaged] == [True]
        assert report.copied == 3
    with pydedup.open(tmp_path / "other.db") as store:
        assert store.verify().ok
        assert list(store.quotas) == []
    with pydedup.open(tmp_path / "new.db") as store:
        store.restore(backup)
        assert [quota.value for quota in store.quotas] == ["a"]


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM {meta} WHERE name = 'epoch'",
        "UPDATE {meta} SET value = 'x' WHERE name = 'epoch'",
    ],
)
def test_a_store_without_its_epoch_is_taken(damage: str, store_url: str, tmp_path: Path) -> None:
    """Nothing can be added to it: it ended in an error, and no copy could be had."""
    fill(store_url)
    change(store_url, damage)
    with pydedup.open(store_url, mode="r") as store:
        with pytest.raises(CorruptStoreError, match=r"its epoch .*\(--skip-damaged\) leaves out"):
            store.copy_to(tmp_path / "strict.db")
        for report in (
            store.copy_to(tmp_path / "copy.db", skip_damaged=True),
            store.backup(tmp_path / "backup.db", skip_damaged=True),
        ):
            (said,) = report.damaged
            assert "its epoch" in said
            assert report.copied == 3
            with pydedup.open(report.target) as other:
                assert other.verify().ok
                other.add("four", MODELS["one"])


def test_a_backup_is_not_replaced_by_less(tmp_path: Path) -> None:
    path, backup = tmp_path / "store.db", tmp_path / "backup.db"
    fill(f"sqlite:///{path}")
    with pydedup.open(path) as store:
        store.backup(backup)
        before = backup.read_bytes()
        change(f"sqlite:///{path}", DAMAGES[0])
        with pytest.raises(CorruptStoreError, match=r"is not replaced: .* \(two@1, "):
            store.backup(backup, replace=True, skip_damaged=True)
        assert backup.read_bytes() == before
        other = tmp_path / "other.db"  # where there is none, none is in its place
        assert store.backup(other, replace=True, skip_damaged=True).damaged
    holds_others(tmp_path / "other.db")
    # What was mended goes into the next one, whatever was begun.
    with pydedup.open(path) as store:
        store.remove("two")
        store.add("two", MODELS["two"], graph=GRAPH)
        assert store.backup(backup, replace=True).damaged == ()
    with pydedup.open(backup) as store:
        assert np.array_equal(store.load("two")["w"], MODELS["two"]["w"])


@pytest.mark.parametrize(
    ("table", "column", "row", "n_models"),
    [
        ("models", "metadata", "id = 2", 2),
        ("aliases", "model_id", "name = 'one'", 3),
        ("meta", "value", "name = 'quotas'", 3),
        ("artifacts", "payload", "model_id = 2", 2),
        ("tensors", "shape", "model_id = 2", 2),
        ("block_maps", "payload", "model_id = 2", 2),
        ("pages", "payload", "id = 2", 2),
        ("distinct_blocks", "slot", "page_id = 2 AND slot = 1", 2),
    ],
)
def test_rows_with_a_value_that_their_column_cannot_have(
    table: str, column: str, row: str, n_models: int, tmp_path: Path
) -> None:
    path = tmp_path / "store.db"
    fill(f"sqlite:///{path}")
    assert put(path, f"pydedup_{table}", column, "NULL", row)
    other = tmp_path / "far.db"
    with pydedup.open(other) as store:
        store.add("far", {"w": np.ones((3, 5))})
    with pydedup.open(path) as store:
        with pytest.raises(CorruptStoreError):
            store.backup(tmp_path / "strict.db")
        assert not (tmp_path / "strict.db").exists()
        shutil.copy(other, tmp_path / "more.db")
        reports = [
            store.backup(tmp_path / "backup.db", skip_damaged=True),
            store.copy_to(tmp_path / "copy.db", skip_damaged=True),
            store.copy_to(tmp_path / "more.db", skip_damaged=True),
        ]
    for report in reports:
        assert report.copied == n_models
        assert report.damaged or table == "meta"
    with pydedup.open(tmp_path / "backup.db") as store:
        assert store.verify().errors == []
        for info in store.models():
            assert np.array_equal(store.load(info.name)["w"], MODELS[info.name]["w"])


@pytest.mark.parametrize("column", ["name", "shape", "dtype", "block_shape"])
def test_a_tensor_that_is_another_is_no_copy(column: str, tmp_path: Path) -> None:
    """It was loaded and copied so, and where two change places, predictions are wrong."""
    path = tmp_path / "store.db"
    fill(f"sqlite:///{path}")
    values = {"name": "v", "shape": "[64, 128]", "dtype": "int32", "block_shape": "[8, 64]"}
    sql = f"UPDATE {{tensors}} SET {column} = ? WHERE model_id = 2"  # noqa: S608
    change(f"sqlite:///{path}", sql, values[column])
    with pydedup.open(path) as store:
        said = "two@1: its tensors are not those that it was added with"
        assert store.verify().errors == [f"{said}; restore a backup"]
        for call in (store.load, lambda name: store.predict(name, np.ones((1, 64), np.float32))):
            with pytest.raises(CorruptStoreError, match=said):
                call("two")
        with pytest.raises(CorruptStoreError, match=said):
            store.backup(tmp_path / "backup.db")
        assert store.copy_to(tmp_path / "copy.db", skip_damaged=True).copied == 2
