# SPDX-License-Identifier: Apache-2.0
"""A new store in a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import pydedup


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def store(url: str) -> Iterator[pydedup.Store]:
    with pydedup.open(url) as opened:
        yield opened
