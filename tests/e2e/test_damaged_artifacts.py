# SPDX-License-Identifier: Apache-2.0
"""What came with a model beside its tensors, such as its graph, is lost or damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup.adapter import ModelRow
from pydedup.errors import ArgumentError, CorruptStoreError, FormatError
from pydedup.graph import Graph, Node
from pydedup.ingest.staged import MatchedModel
from pydedup.policies import Exact

from .damage import change

MODEL = {"w": np.random.default_rng(1).standard_normal((8, 8), np.float32)}
GRAPH = Graph(
    ("x",),
    ("y",),
    (
        Node("linear", ("x",), "h", {"weight": "w"}),
        Node("leaky_relu", ("h",), "y", attrs={"alpha": 0.25}),
    ),
)
X = np.ones((2, 8), np.float32)


def fill(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    save_file(MODEL, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps("x" * 140_000))  # in blocks
    (folder / "vocab.json").write_text(json.dumps("x" * 12_000))  # in rows, of parts
    with pydedup.open(url) as store:
        store.add("one", folder)
        store.add("two", MODEL, graph=GRAPH)


def test_a_tokenizer_that_changes_while_it_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was stored was not what its hash was recorded of, and so taken for damaged."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    fill(url, tmp_path)
    insert = MatchedModel.row

    def changed(model: MatchedModel) -> ModelRow:
        row = insert(model)
        (tmp_path / "folder" / "config.json").write_text("[]")
        return row

    monkeypatch.setattr(MatchedModel, "row", changed)
    with pydedup.open(url) as store:
        with pytest.raises(FormatError, match=r"config.json' changed while three@1 was added"):
            store.add("three", tmp_path / "folder")
        assert [info.address for info in store.models()] == ["one@1", "two@1"]
        monkeypatch.undo()
        store.add("three", tmp_path / "folder")
        assert store.verify().ok


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("DELETE FROM {artifacts} WHERE model_id = 1 AND part = 3", "is not what it was added"),
        ("DELETE FROM {artifacts} WHERE model_id = 1 AND name = 'tokenizer.json'", "is lost"),
        ("DELETE FROM {artifacts} WHERE model_id = 1 AND name = 'vocab.json'", "is lost"),
        ("UPDATE {artifacts} SET payload = ? WHERE model_id = 1 AND part = 1", "is not what it"),
        (
            "UPDATE {artifacts} SET payload = ? WHERE model_id = 1 AND name = 'tokenizer.json'",
            "is not what it",
        ),
    ],
)
def test_a_tokenizer(damage: str, said: str, store_url: str, tmp_path: Path) -> None:
    """What was left of it was exported, or the model without it."""
    fill(store_url, tmp_path)
    change(store_url, damage, *([b"y" * 4_000] if "?" in damage else []))
    said = f"one@1: its '.*(tokenizer|vocab).json' {said}.*; restore a backup"
    with pydedup.open(store_url) as store:
        (told,) = store.verify().errors
        assert re.match(said, told)
        for call in (
            lambda: store.export("one", tmp_path / "out"),
            lambda: store.copy_to(tmp_path / "copy.db", "one"),
            lambda: store.backup(tmp_path / "backup.db"),
        ):
            with pytest.raises(CorruptStoreError, match=said):
                call()
        assert not (tmp_path / "out").exists()
        assert np.array_equal(store.load("one")["w"], MODEL["w"])
        assert store.copy_to(tmp_path / "copy.db", skip_damaged=True).copied == 1


def test_a_tokenizer_whose_blocks_nobody_knows(store_url: str, tmp_path: Path) -> None:
    """A repair must not take them for blocks that the model never had."""
    fill(store_url, tmp_path)
    with pydedup.open(store_url) as store:
        store.copy_to(tmp_path / "good.db")
        wanted = store.artifacts("one")
    change(store_url, "DELETE FROM {tensors} WHERE model_id = 1 AND ordinal = 1")
    with pydedup.open(store_url) as store:
        report = store.verify()
        assert re.match("one@1: its 'tokenizer.json' is not what it was added", report.errors[0])
        store.verify(repair_from=tmp_path / "good.db")
        store.vacuum()
    change(
        store_url,
        "INSERT INTO {tensors} VALUES (1, 1, 'tokenizer.json', 'bytes', '[5, 32768]', ?)",
        "[1, 32768]",
    )
    with pydedup.open(store_url) as store:
        assert store.artifacts("one") == wanted


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM {artifacts} WHERE model_id = 2 AND part = ?",
        "UPDATE {artifacts} SET payload = ? WHERE model_id = 2",
    ],
)
def test_a_graph(damage: str, store_url: str, tmp_path: Path) -> None:
    """A lost one was none, and of one with another number predictions were wrong."""
    fill(store_url, tmp_path)
    with pydedup.open(store_url) as store:
        wanted = store.predict("two", X)
        store.copy_to(tmp_path / "copy.db")
    other = GRAPH.to_json().replace("0.25", "0.75").encode()
    change(store_url, damage, other if "SET" in damage else 0)
    with pydedup.open(store_url) as store:
        with pytest.raises(CorruptStoreError, match=r"two@1: its 'pydedup:graph.json' is "):
            store.predict("two", X)
        (told,) = store.verify().errors
        assert told.startswith("two@1: its 'pydedup:graph.json' is ")
        assert np.array_equal(store.load("two")["w"], MODEL["w"])
        store.remove("two")
        assert store.verify().ok
    with pydedup.open(tmp_path / "copy.db") as store:
        assert np.array_equal(store.predict("two", X), wanted)
        assert store.verify().ok


def test_certificates_say_nothing_of_them(store_url: str, tmp_path: Path) -> None:
    fill(store_url, tmp_path)
    with pydedup.open(store_url) as store:
        report = store.add("three", MODEL, graph=GRAPH)
        figures = store.info("three")
        assert figures.certificate == report.certificate
        assert "artifacts" not in figures.certificate


def test_stores_that_recorded_nothing_of_them(store_url: str, tmp_path: Path) -> None:
    """As those of before did: what is there is taken for what was added."""
    fill(store_url, tmp_path)
    sql = "UPDATE {models} SET certificate = ? WHERE name = 'two'"
    change(store_url, sql, json.dumps({"policy": "lossless", "same_bits": True}))
    with pydedup.open(store_url) as store:
        assert store.verify().ok
        assert store.predict("two", X).shape == (2, 8)
        change(store_url, "DELETE FROM {artifacts} WHERE model_id = 2")
        assert store.verify().ok


class Mine(Exact):
    """A policy whose certificate would have a name that is taken."""

    def parameters(self) -> dict[str, object]:
        return {"artifacts": 1}


def test_policies_cannot_use_the_name(tmp_path: Path) -> None:
    with (
        pydedup.open(tmp_path / "store.db") as store,
        pytest.raises(ArgumentError, match="artifacts"),
    ):
        store.add("one", MODEL, policy=Mine())
