# SPDX-License-Identifier: Apache-2.0
"""``pydedup verify --repair-from`` as it is run."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.testing.program import run_here

from ..damage import flip_last

Change = Callable[[str, int, Callable[[bytearray], Any]], None]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = run_here(*arguments)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Two models that share half of what they have, one file each."""
    rng = np.random.default_rng(2)
    first = rng.standard_normal((256, 64)).astype(np.float32)
    second = np.concatenate([first[:128], rng.standard_normal((128, 64)).astype(np.float32)])
    paths = {}
    for name, array in (("first", first), ("second", second)):
        paths[name] = tmp_path / f"{name}.npz"
        np.savez(paths[name], w=array)
    return paths


def test_damage_is_repaired(
    store_url: str, models: dict[str, Path], change_page: Change, tmp_path: Path
) -> None:
    other = f"sqlite:///{tmp_path}/other.db"
    for url in (store_url, other):
        with pydedup.open(url) as store:
            for name, path in models.items():
                store.add(name, path)
    with pydedup.open(store_url, mode="r") as store:
        pages = [row.id for row in store._adapter.page_rows()]
    for page in pages:
        change_page(store_url, page, flip_last)

    told = run("export", store_url, "second", tmp_path / "back.npz")
    assert (told.returncode, told.stdout) == (4, "")
    assert f"pydedup: error: page {pages[0]}: " in told.stderr
    assert "read by first@1, second@1; verify --repair-from" in told.stderr
    found = run("verify", store_url)
    assert found.returncode == 1
    assert f"damaged: page {pages[0]}: corrupt page: its bytes do not match" in found.stdout
    *_, how, verdict = found.stdout.splitlines()
    assert verdict.startswith(f"DAMAGED ({len(pages)} pages of 2 models): 2 models, ")
    assert "verify --repair-from` another store, a backup or a model's file" in how

    left = run("copy", store_url, tmp_path / "copy.db", "--skip-damaged")
    # Both models are left out, for the same page, which was said for each of them.
    assert (left.returncode, left.stdout.count("left out: damaged")) == (1, 2)
    assert left.stderr.count(f"left out, being damaged: page {pages[0]}: ") == 1

    partly = run("verify", store_url, "--repair-from", models["first"])
    assert partly.returncode == 1
    lines = partly.stdout.splitlines()
    assert lines[0].startswith(f"repaired 1 of {len(pages)} damaged pages: 1 block from ")
    assert (
        f"not found: 1 block of page {pages[-1]}, missed by second@1: the source lacks 1" in lines
    )
    assert lines[-1].startswith("DAMAGED")

    done = run("verify", store_url, "--repair-from", other, "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["ok"], document["damaged_pages"]) == (0, True, {})
    assert document["repair"]["found_blocks"] == 1
    assert document["repair"]["missing"] == []
    nothing = run("verify", store_url, "--repair-from", other)
    assert nothing.returncode == 0
    assert nothing.stdout.splitlines()[0] == "nothing to repair"
    assert nothing.stdout.splitlines()[-1].startswith("sound: 2 models")
    with pydedup.open(store_url, mode="r") as store:
        for name, path in models.items():
            assert store.load(name)["w"].tobytes() == np.load(path)["w"].tobytes()


def test_what_no_repair_mends_is_not_told_to_be_repaired(tmp_path: Path) -> None:
    """``--repair-from`` was told of a lost alias, too, which it does nothing about."""
    url = f"sqlite:///{tmp_path}/s.db"
    with pydedup.open(url) as store:
        store.add("m", {"w": np.ones((9, 9))})
        store.alias("m", "prod", "1")
    with closing(sqlite3.connect(tmp_path / "s.db")) as connection, connection:
        connection.execute("DELETE FROM pydedup_aliases")
    told = run("verify", url)
    assert told.returncode == 1
    found, how, verdict = told.stdout.splitlines()
    assert "m@prod" in found
    assert how == "docs/faults.md says what to do"
    assert verdict.startswith("DAMAGED: 1 model, ")


def test_of_many_models_that_miss_blocks_some_are_named(
    tmp_path: Path, change_page: Change
) -> None:
    """The line named all of them: of 3,000 models it had 45 kB."""
    url, other = f"sqlite:///{tmp_path}/s.db", f"sqlite:///{tmp_path}/other.db"
    with pydedup.open(url) as store:
        store.add_many({f"m{number}": {"w": np.ones((9, 9))} for number in range(20)})
        (page,) = [row.id for row in store._adapter.page_rows()]
    with pydedup.open(other) as store:
        store.add("m", {"w": np.zeros((9, 9))})
    change_page(url, page, flip_last)
    told = run("verify", url, "--repair-from", other)
    assert told.returncode == 1
    assert "missed by m0@1, m10@1, m11@1, m12@1, m13@1 and 15 more: " in told.stdout


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("none.db", 3, "none.db does not exist"),
        ("notes.md", 5, "neither a store nor a model"),
        ("sqlite:///none.db", 3, "nothing to repair from: there is no file"),
        ("postgresql://me:secret@127.0.0.1:1/x", 4, "127.0.0.1"),
        ("nosql://here", 2, "nosql:// is not known"),
    ],
)
def test_what_is_no_source(
    source: str, status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("no model")
    pydedup.open(tmp_path / "store.db").close()
    done = run("verify", "store.db", "--repair-from", source)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert "secret" not in done.stderr
    assert not (tmp_path / "none.db").exists()
    assert run("verify", "none.db", "--repair-from", "store.db").returncode == 3
    assert not (tmp_path / "none.db").exists()
