# SPDX-License-Identifier: Apache-2.0
"""What a store looks like: figures.py computes sizes, sharing and differences. No output here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydedup._lazy import modules_of

#: What `import pydedup` gives as ``pydedup.report.NAME``.
_MODULES = frozenset({"compare", "figures", "sizes"})

if not TYPE_CHECKING:
    __getattr__ = modules_of(__name__, _MODULES)
