# SPDX-License-Identifier: Apache-2.0
"""Packages whose modules need no import of their own.

``pydedup.moving.copy`` works after ``import pydedup`` alone, and costs its time only when used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from types import ModuleType

__all__ = ["modules_of"]


def modules_of(package: str, names: Collection[str]) -> Callable[[str], ModuleType]:
    """Return the ``__getattr__`` of a package that imports these of its modules when asked."""

    def imported(name: str) -> ModuleType:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return imported
