# SPDX-License-Identifier: Apache-2.0
"""Smaller pages, so that little data spans as many of them as much data does otherwise.

What is in this process, and in what it forks, is changed; a program that it starts is not.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Final
from unittest.mock import patch

from pydedup import layout

__all__ = ["small_pages"]

#: All that have the capacity of a page, by name: each has its own.
_MODULES: Final = (
    "pydedup.layout",
    "pydedup.ingest.spool",
    "pydedup.ingest.pages",
    "pydedup.maintenance.repack",
    "pydedup.maintenance.repair",
)


@contextlib.contextmanager
def small_pages(kib: int = 256) -> Iterator[None]:
    """Let pages that are written have at most so many KiB, instead of 1024."""
    capacity = layout.PAGE_CAPACITY - layout.PAGE_BYTES + kib * 1024
    # All before one is changed: what takes the capacity from another when it is imported keeps it.
    modules = [import_module(name) for name in _MODULES]
    with contextlib.ExitStack() as changed:
        for module in modules:
            changed.enter_context(patch.object(module, "PAGE_CAPACITY", capacity))
        yield
        others = {
            name
            for name, module in list(sys.modules.items())
            if name.startswith("pydedup.") and getattr(module, "PAGE_CAPACITY", None) == capacity
        }
    if unknown := others - set(_MODULES):
        raise AssertionError(f"{sorted(unknown)} keep small pages: name them in {__name__}")
