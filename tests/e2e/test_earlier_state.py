# SPDX-License-Identifier: Apache-2.0
"""Tables that go back to what they were earlier while a store is open.

A dump of last night is restored, or a standby takes over that lacks the last adds. From then on the
database gives numbers anew that were given before, to other models and pages.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.errors import UnavailableError


def model(seed: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(seed).standard_normal((300, 300)).astype(np.float32)}


def copy_database(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
        one.backup(other)


def test_pages_of_later_models_are_not_taken_for_those_before(tmp_path: Path) -> None:
    """A page under a number that was given again was in memory: weights were those of another."""
    live, dump = tmp_path / "store.db", tmp_path / "dump.db"
    with pydedup.open(live) as writer:
        writer.add("first", model(1))
    copy_database(live, dump)
    with pydedup.open(live, mode="r") as reader:
        reader.load("first")
        with pydedup.open(live) as writer:
            writer.add("lost", model(2))
        assert reader.load("lost")["w"].tobytes() == model(2)["w"].tobytes()
        copy_database(dump, live)
        with pydedup.open(live) as writer:
            writer.add("twin", model(1))  # has the number of the model that is lost, and no page
            writer.add("new", model(3))
        assert reader.load("first")["w"].tobytes() == model(1)["w"].tobytes()
        for read in (reader.load, lambda name: reader.tensor(name, "w")):
            with pytest.raises(UnavailableError, match=r"restored .* earlier; open it again"):
                read("new")
    with pydedup.open(live, mode="r") as reader:
        assert reader.load("new")["w"].tobytes() == model(3)["w"].tobytes()
        assert reader.verify().ok


def test_a_vacuum_writes_no_page_that_was_in_memory_before(tmp_path: Path) -> None:
    """It copied blocks of lost models into new pages, in the place of those of others."""
    live, dump = tmp_path / "store.db", tmp_path / "dump.db"
    kept = {"w": model(3)["w"][:100]}
    with pydedup.open(live) as writer:
        writer.add("first", model(1))
    copy_database(live, dump)
    with pydedup.open(live) as old:
        old.add("lost", model(2))
        old.load("lost")
        copy_database(dump, live)
        with pydedup.open(live) as writer:
            writer.add("twin", model(1))
            writer.add("new", {"w": kept["w"], "other": model(3)["w"][100:]})
            writer.add("kept", kept)
            writer.remove("new")
        with pydedup.open(live, mode="r") as reader:
            assert reader.vacuum(dry_run=True).rewritten_pages
        said = old.vacuum().not_repacked
        assert said is not None
        assert "restored to what they were earlier; open it again" in said
    with pydedup.open(live) as store:
        assert store.load("kept")["w"].tobytes() == kept["w"].tobytes()
        assert store.vacuum().rewritten_pages
        assert store.verify().ok


def test_a_copy_takes_no_page_that_was_in_memory_before(tmp_path: Path) -> None:
    """It called the store damaged, and with ``skip_damaged`` left out models that are sound."""
    live, dump = tmp_path / "store.db", tmp_path / "dump.db"
    with pydedup.open(live) as writer:
        writer.add("first", model(1))
    copy_database(live, dump)
    with pydedup.open(live, mode="r") as old:
        with pydedup.open(live) as writer:
            writer.add("lost", model(2))
        old.load("lost")
        copy_database(dump, live)
        with pydedup.open(live) as writer:
            writer.add("twin", model(1))
            writer.add("new", model(3))
        for skips in (False, True):
            with pytest.raises(UnavailableError, match=r"restored .* earlier; open it again"):
                old.backup(tmp_path / "backup.db", skip_damaged=skips)
            with pytest.raises(UnavailableError, match=r"restored .* earlier; open it again"):
                old.copy_to(tmp_path / "copy.db", skip_damaged=skips)
    with pydedup.open(live, mode="r") as reader:
        reader.backup(tmp_path / "backup.db")
        reader.copy_to(tmp_path / "copy.db")
    for path in ("backup.db", "copy.db"):
        with pydedup.open(tmp_path / path, mode="r") as copied:
            assert copied.load("new")["w"].tobytes() == model(3)["w"].tobytes()
