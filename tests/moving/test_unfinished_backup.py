# SPDX-License-Identifier: Apache-2.0
"""Backups that are not finished yet: who goes on with the file, and with what of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pydedup
from pydedup.errors import ConflictError
from pydedup.jobs import Job

New = Callable[[str], str]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (("m@1", 1), ("m@1", 2)),  # the old model would be in the way of every backup to that file
        (("old@1", 1), ("new@1", 1)),  # the backup would have it by its old name, too
    ],
)
def test_what_is_left_is_not_used_where_a_name_means_another_model_by_now(
    tmp_path: Path, family: Callable[..., Any], before: tuple[str, int], now: tuple[str, int]
) -> None:
    url, file = f"sqlite:///{tmp_path / 'store.db'}", tmp_path / "backup"
    with pydedup.open(url) as store:
        store.add(before[0], family(before[1]))
        store.backup(file)
        file.rename(f"{file}.partial")
        store.remove(before[0])
        store.add(now[0], family(now[1]))
        assert store.backup(file).copied == 1
    with pydedup.open(file, mode="r") as kept:
        assert [info.address for info in kept.models()] == [now[0]]
        assert kept.load(now[0])["w"].tobytes() == family(now[1])["w"].tobytes()


@pytest.mark.parametrize("left", ["first", "last"])
def test_a_backup_that_could_not_say_that_it_ended_can_be_started_again(
    filled: New, tmp_path: Path, assert_same: Any, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Ctrl-C as it ends, or twice: for ten minutes, "another backup is being written"."""
    url, file = filled("sqlite"), tmp_path / "backup"
    end, ended = Job.end, 0

    def interrupted(job: Job) -> None:
        nonlocal ended
        ended += 1
        if left == "first" or job._kind == "backup":
            raise KeyboardInterrupt
        end(job)

    with pydedup.open(url, mode="r") as store:
        with monkeypatch.context() as patch:
            patch.setattr(Job, "end", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.backup(file)
        assert ended > 1
        with pydedup.open(f"{file}.partial", mode="r") as partial:
            assert partial._adapter.jobs()
        store.backup(file)
    assert_same(url, str(file))
    with pydedup.open(file, mode="r") as kept:
        assert not kept._adapter.jobs()


def test_a_backup_keeps_others_of_its_process_away(filled: New, tmp_path: Path) -> None:
    url, file = filled("sqlite"), tmp_path / "backup"
    (tmp_path / "linked").symlink_to(tmp_path)

    def begin_another(stage: str, done: int, total: int) -> None:
        for name in (file, tmp_path / "linked" / "backup"):
            with pytest.raises(ConflictError, match="another backup is being written"):
                store.backup(name)

    with pydedup.open(url, mode="r") as store:
        store.backup(file, progress=begin_another)


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
