# SPDX-License-Identifier: Apache-2.0
"""Backups that are not finished yet: who goes on with the file, and with what of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pydedup

New = Callable[[str], str]


def test_what_is_left_is_not_used_where_a_model_has_another_name_by_now(
    tmp_path: Path, family: Callable[..., Any]
) -> None:
    """All else of it is the same, and the backup would have it by its old name, too."""
    url, file = f"sqlite:///{tmp_path / 'store.db'}", tmp_path / "backup"
    with pydedup.open(url) as store:
        store.add("old@1", family(1))
        store.backup(file)
        file.rename(f"{file}.partial")
        store.remove("old")
        store.add("new@1", family(1))
        store.backup(file)
    with pydedup.open(file, mode="r") as kept:
        assert [info.address for info in kept.models()] == ["new@1"]


def test_a_backup_that_takes_long_says_that_it_lives(
    filled: New, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one would have gone on with its file."""
    monkeypatch.setattr("pydedup.jobs._BEAT_SECONDS", -1.0)
    url, file = filled("sqlite"), tmp_path / "backup"
    signs: set[str] = set()

    def look(stage: str, done: int, total: int) -> None:
        with pydedup.open(f"{file}.partial", mode="r") as partial:
            running = partial._adapter.jobs()
        signs.update(at for _, spec, at, _ in running if json.loads(spec)["kind"] == "backup")

    with pydedup.open(url, mode="r") as store:
        store.backup(file, progress=look)
    assert len(signs) > 1
