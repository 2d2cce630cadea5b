# SPDX-License-Identifier: Apache-2.0
"""Stores that commands are run on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file({"w": np.arange(4096, dtype=np.float32).reshape(64, 64)}, path)
    return path


@pytest.fixture(scope="module")
def kept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of m@1 and m@2 that tests leave as it is."""
    url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'kept.db'}"
    with pydedup.open(url) as store:
        store.add("m@1", model)
        store.add("m@2", {"w": np.ones((64, 64), np.float32)})
    return url


@pytest.fixture
def url(kept: str, tmp_path: Path) -> str:
    """A copy of that store, to be changed."""
    path = tmp_path / "copy.db"
    shutil.copy(kept.removeprefix("sqlite:///"), path)
    return f"sqlite:///{path}"


def path_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))
