# SPDX-License-Identifier: Apache-2.0
"""Store families of similar deep-learning models once, in a database, and predict from its pages.

Here: the public names, nothing else. Modules are imported when they are first asked for, so that
a process that only predicts starts fast, and Ctrl-C ends the program in order while it starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydedup.errors import PydedupError

if TYPE_CHECKING:
    from pydedup import policies
    from pydedup.store import Store, open

    __version__: str

__all__ = ["PydedupError", "Store", "__version__", "open", "policies"]

#: What can be had as ``pydedup.NAME`` without an import of its own.
_MODULES = frozenset(
    {
        "accuracy",
        "adapter",
        "blocks",
        "catalog",
        "certificates",
        "codec",
        "config",
        "conv",
        "encoding",
        "errors",
        "formats",
        "graph",
        "hashing",
        "jobs",
        "joint",
        "layout",
        "maintenance",
        "matmul",
        "moving",
        "names",
        "packing",
        "policies",
        "pool",
        "quotas",
        "registry",
        "replacement",
        "report",
        "signatures",
        "similarity",
        "store",
        "types",
        "usage",
    }
)

if not TYPE_CHECKING:  # to a type checker, names that there are not stay unknown

    def __getattr__(name: str) -> Any:
        if name in ("Store", "open"):
            from pydedup import store

            globals()[name] = getattr(store, name)
            return globals()[name]
        if name in _MODULES:
            import importlib

            return importlib.import_module(f"pydedup.{name}")
        if name == "__version__":
            from importlib.metadata import version

            globals()[name] = version("pydedup")
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*_MODULES, *__all__})
