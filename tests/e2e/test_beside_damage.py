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
from pydedup.errors import CorruptStoreError

from .damage import change, put

NAMES = ("one", "two", "three")
MODELS = {
    name: {"w": np.random.default_rng(seed).standard_normal((128, 64), np.float32)}
    for seed, name in enumerate(NAMES)
}
OTHERS = ["one@1", "three@1"]
#: What is damaged of the model two, by what is said of it.
DAMAGES = {
    "the metadata of two@1": "UPDATE {models} SET metadata = '[' WHERE name = 'two'",
    "two@1, tensor 'w': a block map": "DELETE FROM {block_maps} WHERE model_id = 2",
    "the certificate of two@1": "UPDATE {models} SET certificate = '[' WHERE name = 'two'",
    "1 pages do not exist": "DELETE FROM {pages} WHERE id = 2",
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
