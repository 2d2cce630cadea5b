# SPDX-License-Identifier: Apache-2.0
"""What a store looks like: figures.py computes sizes, sharing and differences. No output here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

#: What `import pydedup` gives as ``pydedup.report.NAME``.
_MODULES = frozenset({"compare", "figures", "sizes"})

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            import importlib

            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
