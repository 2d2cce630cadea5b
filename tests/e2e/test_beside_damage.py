# SPDX-License-Identifier: Apache-2.0
"""Commands that go through a whole store tell what is damaged, and go on with all else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.cli.app import main
from pydedup.errors import CorruptStoreError, DuplicateError
from pydedup.testing.pages import small_pages

from .damage import change, put

NAMES = ("one", "two", "three")
MODELS = {
    name: {"w": np.random.default_rng(seed).standard_normal((128, 64), np.float32)}
    for seed, name in enumerate(NAMES)
}
OTHERS = ["one@1", "three@1"]
#: Rows of tensors of which the first is matched before the other, on pages of its own.
MIXED = {"sound": 1024, "damaged": 768}
#: What is damaged of the model two, by what is said of it.
DAMAGES = {
    "the metadata of two@1": "UPDATE {models} SET metadata = '[' WHERE name = 'two'",
    "two@1, tensor 'w': a block map": "DELETE FROM {block_maps} WHERE model_id = 2",
    "the certificate of two@1": "UPDATE {models} SET certificate = '[' WHERE name = 'two'",
    "1 page does not exist": "DELETE FROM {pages} WHERE id = 2",
}


def fill(url: str) -> None:
    with pydedup.open(url) as store:
        for name, model in MODELS.items():
            store.add(name, model)
        store.alias("one", "prod", "1")


@pytest.mark.parametrize("column", ["created_at", "metadata", "logical_bytes"])
def test_a_damaged_row_of_a_model(
    column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of `ls --json` and `stats` nothing came but the error."""
    path = tmp_path / "store.db"
    fill(f"sqlite:///{path}")
    assert put(path, "pydedup_models", column, "NULL", "id = 2")
    said = f"column {column} of pydedup_models .* in the row of id 2, name 'two', version '1'; rem"
    with pydedup.open(path) as store:
        stats = store.stats()
        assert [re.match(said, each) is not None for each in stats.damaged] == [True]
        assert (stats.versions, stats.tensors, stats.pages) == (2, 2, 3)
        assert stats.logical_bytes == 2 * MODELS["one"]["w"].nbytes
    for command, wanted in (
        (["ls", str(path)], OTHERS),
        (["ls", str(path), "one"], OTHERS[:1]),
        (["ls", str(path), "one@prod"], OTHERS[:1]),
        (["ls", str(path), "two"], []),
    ):
        assert main([*command, "--json"]) == 4
        out, err = capsys.readouterr()
        assert re.search(said, err)
        if not wanted:
            assert out == ""
            continue
        document = json.loads(out)
        assert [model["model"] for model in document["models"]] == wanted
        assert document["store"]["damaged"] == list(stats.damaged)
    assert main(["stats", str(path), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["versions"] == 2
    assert main(["stats", str(path)]) == 4
    assert "2 in 2 versions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "column", "row"),
    [
        ("aliases", "model_id", "name = 'one'"),
        ("pages", "checksum", "id = 2"),
        ("model_pages", "blocks", "model_id = 2"),
        ("tensors", "name", "model_id = 2"),
    ],
)
def test_a_damaged_row_beside_models(
    table: str, column: str, row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "store.db"
    fill(f"sqlite:///{path}")
    assert put(path, f"pydedup_{table}", column, "NULL", row)
    for command in ("ls", "stats"):
        assert main([command, str(path), "--json"]) == 4
        out, err = capsys.readouterr()
        assert f"column {column} of pydedup_{table}" in err
        document = json.loads(out)
        assert document.get("store", document)["versions"] == 3


def test_a_model_whose_pages_are_recorded_wrongly_is_removed(tmp_path: Path) -> None:
    """It is the way out that errors name."""
    path = tmp_path / "store.db"
    fill(f"sqlite:///{path}")
    assert put(path, "pydedup_model_pages", "blocks", "NULL", "model_id = 2")
    with pydedup.open(path) as store:
        assert store.remove("two") == ["two@1"]
        assert store.vacuum().pages_after == 1
        assert store.verify().ok
        assert [np.array_equal(store.load(a)["w"], MODELS[a[:-2]]["w"]) for a in OTHERS] == [
            True
        ] * 2


@pytest.mark.parametrize("said", DAMAGES)
def test_a_report_is_made_of_all_else(
    said: str, store_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2")
    fill(store_url)
    with pydedup.open(store_url) as store:
        store.add("half", {"w": MODELS["two"]["w"][:64]})  # what it takes of a page, that says
    change(store_url, DAMAGES[said])
    path = tmp_path / "r.html"
    assert main(["report", store_url, "-o", str(path), "--json", "-q"]) == 4
    out, err = capsys.readouterr()
    assert said in err
    assert any(said in each for each in json.loads(out)["damaged"])
    page = path.read_text(encoding="utf-8")
    assert 'id="damaged"' in page
    assert "three@1" in page
    with pydedup.open(store_url) as store, pytest.raises(CorruptStoreError, match=re.escape(said)):
        store.report(models="two")


def test_an_add_warns_of_pages_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "store.db"
    fill(f"sqlite:///{path}")
    change(f"sqlite:///{path}", PAGE_DAMAGES[0])
    np.savez(tmp_path / "four.npz", **MODELS["two"])
    assert main(["add", str(path), "four", str(tmp_path / "four.npz"), "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["models"][0]["damaged_pages"] == [2]
    assert "nothing was shared with pages that cannot be read" in err
    assert err.endswith("space: 2; run verify on the store\n")


def near(name: str, by: float = 1e-4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(9)
    weights = MODELS[name]["w"]
    return {"w": (weights * (1 + by * rng.standard_normal(weights.shape))).astype("f4")}


#: Of page 2, which the model two is on.
PAGE_DAMAGES = [
    "UPDATE {pages} SET payload = substr(payload, 1, 9000) WHERE id = 2",
    "DELETE FROM {pages} WHERE id = 2",
    "UPDATE {distinct_blocks} SET slot = 40 WHERE page_id = 2 AND slot = 1",
    "UPDATE {distinct_blocks} SET slot = -1 WHERE page_id = 2 AND slot = 1",
]


@pytest.mark.parametrize("damage", PAGE_DAMAGES)
@pytest.mark.parametrize("policy", [policies.Lossless(), policies.Bounded(0.01)])
def test_an_add_shares_nothing_with_a_page_that_cannot_be_read(
    damage: str, policy: policies.Policy, store_url: str
) -> None:
    """Every add of a model like those on the page ended in its damage."""
    fill(store_url)
    change(store_url, damage)
    added = {
        "four": near("two"),
        "five": MODELS["two"],
        "two": {"w": np.concatenate([MODELS["two"]["w"][:64], near("two")["w"][64:]])},
    }
    with pydedup.open(store_url) as store:
        for name, model in added.items():
            report = store.add(name, model, policy=policy)
            assert report.damaged_pages == (2,) or "{distinct_blocks}" in damage or name == "two"
            loaded = store.load(name)["w"]
            np.testing.assert_allclose(loaded, model["w"], rtol=0.05)
            if policy == policies.Lossless():
                assert np.array_equal(loaded, model["w"])
        far = np.random.default_rng(7).standard_normal((128, 64), np.float32)
        for name in ("one", "three"):
            assert store.add(f"{name}@2", MODELS[name]).pages == 0
        store.add("far", {"w": far})
        assert np.array_equal(store.load("far")["w"], far)


def test_an_add_leaves_out_all_damaged_pages_at_once(store_url: str) -> None:
    """It was matched anew for each of them."""
    rng = np.random.default_rng(3)
    model = {name: rng.standard_normal((rows, 256), np.float32) for name, rows in MIXED.items()}
    done: list[int] = []
    with small_pages(64), pydedup.open(store_url) as store:
        store.add("one", model, policy=policies.Exact())
        maps = [store._catalog.model("one").block_map(name).page_ids for name in MIXED]
        damaged = sorted(set(maps[1].tolist()) - set(maps[0].tolist()))
        assert len(damaged) > 8
        cut = "UPDATE {pages} SET payload = substr(payload, 1, 9000) WHERE id = ?"
        for page_id in damaged:
            change(store_url, cut, page_id)

    def note(stage: str, value: int, total: int) -> None:
        if stage == "matching":
            done.append(value)

    # Anew: in SQLite's file what was cut off is still there, and would be read where it was met.
    with small_pages(64), pydedup.open(store_url) as store:
        report = store.add("two", model, policy=policies.Exact(), progress=note)
        assert report.damaged_pages == tuple(damaged)
        assert done.count(model["sound"].nbytes) == 2  # times that it was matched
        assert all(np.array_equal(store.load("two")[name], array) for name, array in model.items())


@pytest.mark.parametrize("said", DAMAGES)
def test_usage_is_counted_beside_damage(
    said: str, store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`stats --by`, `quota` and `explain` ended in the damage of another model."""
    with pydedup.open(store_url) as store:
        for name, model in MODELS.items():
            store.add(name, model, metadata={"tenant": name})
        shared = {"w": np.concatenate([MODELS["three"]["w"][:64], MODELS["two"]["w"][:64]])}
        store.add("half", shared, block_shape=(64, 64), metadata={"tenant": "three"})
        store.quotas.set("tenant", "three", "1GB")
        store.quotas.set("size", None, "1GB")
        needs_page = store.explain("half").shared_with
    change(store_url, DAMAGES[said])
    left_out = ["two"] if not said.startswith("the certificate") else []
    with pydedup.open(store_url) as store:
        usage = store.stats(by="tenant")
        known = {value.value: value for value in usage.values}
        assert known["one"].logical_bytes == MODELS["one"]["w"].nbytes
        assert usage.keys == ("tenant",)
        if said.startswith("1 page"):
            return
        assert [said in each for each in usage.damaged] == [True for _ in left_out]
        assert ("two" in known) is not bool(left_out)
        explained = store.explain("half")
        assert {other.model for other in needs_page} >= {
            other.model for other in explained.shared_with
        }
    for command in (["stats", store_url, "--by", "tenant"], ["quota", store_url]):
        for more in ([], ["--json"]):
            assert main([*command, *more]) == (4 if left_out else 0)
            out, err = capsys.readouterr()
            assert "three" in out
            assert (said in err) is bool(left_out)


def test_explain_leaves_out_a_damaged_neighbour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "store.db"
    fill(f"sqlite:///{path}")
    with pydedup.open(path) as store:
        for name in ("same", "again"):
            store.add(name, MODELS["two"])
    change(f"sqlite:///{path}", DAMAGES["two@1, tensor 'w': a block map"])
    with pydedup.open(path) as store:
        explained = store.explain("same")
        assert [other.model for other in explained.shared_with] == ["again@1"]
        assert ["two@1, tensor 'w'" in said for said in explained.damaged] == [True]
        with pytest.raises(CorruptStoreError, match="two@1"):
            store.explain("two")
    assert main(["explain", str(path), "same", "--json", "-q"]) == 4
    out, err = capsys.readouterr()
    assert json.loads(out)["damaged"] == list(explained.damaged)
    assert "two@1, tensor 'w'" in err


@pytest.mark.parametrize(
    ("said", "damage"),
    [
        (
            "two@1, tensor 'w': a block map holds 0 blocks",
            "DELETE FROM {block_maps} WHERE model_id = 2",
        ),
        ("1 page does not exist: 2; read by two@1; ver", "DELETE FROM {pages} WHERE id = 2"),
        ("page 2: .*; read by two@1", "UPDATE {pages} SET payload = checksum WHERE id = 2"),
    ],
)
def test_a_vacuum_frees_what_nobody_uses_beside_a_damaged_model(
    said: str, damage: str, store_url: str
) -> None:
    """It freed nothing, and did not say whose the missing page is."""
    fill(store_url)
    with pydedup.open(store_url) as store:
        store.add("four", {"w": MODELS["one"]["w"] + 1})
        (page,) = (page for _, page, _, _ in store._adapter.model_pages(4))
        store.remove("four")
    change(store_url, damage)
    with pydedup.open(store_url) as store:
        told = f"^1 page freed, and none repacked: {said}"
        with pytest.raises(CorruptStoreError, match=told) as caught:
            store.vacuum()
        assert caught.value.page_ids == (() if "a block map" in said else (2,))
        assert store._adapter.page_rows(ids=[page]) == []
        for name in ("one", "three"):
            assert store.load(name)["w"].tobytes() == MODELS[name]["w"].tobytes()
        store.remove("two")
        store.vacuum()
        assert store.verify().damaged_pages == {}


@pytest.mark.parametrize("damage", ["state = 'lively'", "version = '1x'", "version = '0'"])
def test_the_version_of_a_damaged_row_is_given_to_no_other(damage: str, store_url: str) -> None:
    """Who asked for it got another model once it was added again without one."""
    fill(store_url)
    change(store_url, f"UPDATE {{models}} SET {damage} WHERE name = ?", "two")  # noqa: S608
    with pydedup.open(store_url) as store:
        assert store.add("two", MODELS["one"]).model == "two@2"
        with pytest.raises(DuplicateError, match="two@1 is in the store already; add another ver"):
            store.add("two@1", MODELS["one"])
        (report,) = store.add_many({"two": MODELS["one"]})
        assert report.model == "two@3"
        damaged = "two@" + ("1" if "state" in damage else damage.split("'")[1])
        assert store.remove(damaged) == [damaged]
        assert store.add("two@1", MODELS["two"]).model == "two@1"


def test_a_model_whose_state_is_damaged_can_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    fill(f"sqlite:///{path}")
    for value in ("'lively'", "NULL"):
        with pydedup.open(path) as store:
            store.add("four", {"w": MODELS["one"]["w"] + 1})
        assert put(path, "pydedup_models", "state", value, "name = 'four'")
        with pydedup.open(path) as store:
            assert not store.verify().ok
            with pytest.raises(CorruptStoreError, match="is damaged"):
                store.vacuum()
            assert store.remove("four@1") == ["four@1"]
            store.vacuum()
            assert store.verify().ok
            assert [info.name for info in store.models()] == ["one", "three", "two"]


@pytest.mark.parametrize("table", ["tensors", "block_maps"])
def test_models_read_together_with_a_damaged_one_are_in_the_figures(
    table: str, tmp_path: Path
) -> None:
    """What is read of several at once fails as a whole; only one of them is damaged."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((64, 64))
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        for number in range(5):
            tensors = {"base": base, "own": rng.standard_normal((8, 64))}
            store.add(f"m{number}", tensors, metadata={"t": str(number % 2)})
        lost = store._catalog.resolve("m3").id
    assert put(path, f"pydedup_{table}", "ordinal", "'text'", f"model_id = {lost} AND ordinal = 1")
    with pydedup.open(path) as store:
        explained = store.explain("m0")
        assert {other.model for other in explained.shared_with} == {"m1@1", "m2@1", "m4@1"}
        assert len(explained.damaged) == 1
        usage = store.stats(by="t")
        assert {value.value: value.models for value in usage.values} == {"0": 3, "1": 1}
        assert len(usage.damaged) == 2, "the row, and what the model lacks without it"
