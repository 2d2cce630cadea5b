# SPDX-License-Identifier: Apache-2.0
"""Small pages for tests: what is added has more of them, and afterwards all is as it was."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import layout
from pydedup.ingest import pages as page_writing
from pydedup.testing.pages import small_pages


def pages(path: Path) -> int:
    """How many pages a model of 1 MiB takes."""
    weights = np.random.default_rng(0).standard_normal((1024, 256)).astype(np.float32)
    with pydedup.open(path) as store:
        return store.add("m", {"w": weights}, policy=pydedup.policies.Exact()).pages


def test_a_model_has_more_of_them(tmp_path: Path) -> None:
    before = layout.PAGE_CAPACITY
    usual = pages(tmp_path / "usual.db")
    with small_pages(64):
        assert pages(tmp_path / "small.db") >= 16 > usual
        assert before - page_writing.PAGE_CAPACITY == 960 * 1024
    assert before == layout.PAGE_CAPACITY == page_writing.PAGE_CAPACITY
    assert pages(tmp_path / "again.db") == usual


def test_a_module_that_is_not_known_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    late = types.ModuleType("pydedup.late")

    def load_late() -> None:
        with small_pages():
            late.PAGE_CAPACITY = layout.PAGE_CAPACITY  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, "pydedup.late", late)

    with pytest.raises(AssertionError, match=r"pydedup\.late"):
        load_late()


def test_modules_that_were_not_imported_yet_are_as_they_were() -> None:
    """They kept small pages, if it was in one of these that they were imported."""
    code = (
        "from pydedup import layout\n"
        "from pydedup.testing.pages import _MODULES, small_pages\n"
        "with small_pages(): pass\n"
        "import sys\n"
        "assert {sys.modules[name].PAGE_CAPACITY for name in _MODULES} == {layout.PAGE_CAPACITY}\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
