# SPDX-License-Identifier: Apache-2.0
"""Packages whose modules need no import of their own.

``pydedup.moving.copy`` works after ``import pydedup`` alone, and costs its time only when used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

__all__ = ["modules_of"]


def modules_of(package: str) -> Callable[[str], ModuleType]:
    """Return the ``__getattr__`` of a package that imports its public modules when asked."""

    def imported(name: str) -> ModuleType:
        module = f"{package}.{name}"
        if not name.startswith("_"):
            try:
                return importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:  # one that it needs is missing
                    raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return imported
