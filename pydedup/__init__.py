# SPDX-License-Identifier: Apache-2.0
"""Store families of similar deep-learning models once, in a database, and predict from its pages.

    with pydedup.open("sqlite:///models.db") as store:
        store.add("sentiment@1", "sentiment.safetensors")
        arrays = store.load("sentiment")

`help(pydedup.Store)` says what a store does. Beside it there are

    pydedup.policies      what is guaranteed of a stored model
    pydedup.errors        all exceptions, as a tree
    pydedup.types         what methods return
    pydedup.words         the fixed words that arguments take, as types for your own signatures
    pydedup.graph         layers as you describe them, for `Store.predict`
    pydedup.config        kernels, threads, sizes such as "512MiB"
    pydedup.replacement   recorded uses of pages, and how policies replay them
    pydedup.hashing, pydedup.similarity, pydedup.packing    the algorithms by themselves
    pydedup.adapter       what a database of your own must offer; pydedup.adapters.dbapi does most
                          of it for those with SQL, pydedup.testing has the tests that it must pass
    import pydedup.sql    predictions as functions of SQLite
    import pydedup.ray    scoring and serving on a Ray cluster

and what their ``__all__`` name. All else is pydedup's own and changes with any version.
"""

# Modules are imported when they are first asked for, so that a process that only predicts starts
# fast, and Ctrl-C ends the program in order while it starts.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydedup.errors import PydedupError

if TYPE_CHECKING:
    # As editors and type checkers see it, these are attributes only if they are imported.
    from pydedup import adapter as adapter
    from pydedup import config as config
    from pydedup import errors as errors
    from pydedup import graph as graph
    from pydedup import hashing as hashing
    from pydedup import packing as packing
    from pydedup import policies as policies
    from pydedup import replacement as replacement
    from pydedup import similarity as similarity
    from pydedup import types as types
    from pydedup import words as words
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
        "words",
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
        if name == "_core":
            return _compiled_core()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def _compiled_core() -> Any:
        # What is asked for first of all: in a checkout, Python takes the sources for the package.
        import importlib

        try:
            return importlib.import_module("pydedup._core")
        except ModuleNotFoundError as error:
            if error.name != "pydedup._core":
                raise
            raise ImportError(
                f"{__path__[0]} has no compiled core for this Python; if that is a checkout, start "
                "Python in another folder, or with its option -P, and it takes the pydedup that is "
                "installed (`pip install .` in the checkout installs it)",
                name=error.name,
            ) from None


def __dir__() -> list[str]:
    return sorted({*_MODULES, *__all__})
