# SPDX-License-Identifier: Apache-2.0
"""Backups of stores that others add to meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pydedup
from pydedup import registry
from pydedup.store import Store
from pydedup.testing.faults import Fault, inject


@pytest.mark.parametrize("backend", ["sqlite", "postgres", "mysql"])
def test_who_adds_as_a_backup_is_replaced_has_lost_no_model(
    filled: Callable[[str], str], tmp_path: Path, family: Callable[..., Any], backend: str
) -> None:
    """A model whose pages were seen, and its row not, was one that is damaged or lost."""
    url, file = filled(backend), tmp_path / "backup"

    def add() -> None:
        with pydedup.open(url) as other:
            other.add("late", family(30))

    adapter, control = inject(registry.connect(url, mode="r"))
    with Store(adapter, 64 << 20) as store:
        store.backup(file)
        control.add_fault(Fault("model_pages", add, call=control.calls["model_pages"] + 1))
        assert store.backup(file, replace=True).copied == 9
    with pydedup.open(file) as kept:
        assert kept.load("late")["step"] == family(30)["step"]
