# SPDX-License-Identifier: Apache-2.0
"""Where the URL of a store, or a token, comes from: as it is, or from where it is used.

``env:NAME`` and ``file:PATH`` are read in the processes that need the text, and Ray is never
handed it. The text itself travels as a `Secret`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from pydedup.errors import ArgumentError, MissingStoreError, PydedupError
from pydedup.opening import connect_store
from pydedup.ray.cluster import Secret
from pydedup.registry import redact

__all__ = ["FILE", "hindrance", "is_here", "models", "reveal"]

_ENVIRONMENT, FILE = "env:", "file:"
#: Of a pool that no page is read into.
_LEAST_MEMORY: Final = "64MiB"
_Told = TypeVar("_Told")


def is_here(text: str) -> bool:
    """Whether this is the text itself, and not where a process finds it."""
    return not text.startswith((_ENVIRONMENT, FILE))


def reveal(source: Secret) -> str:
    """Return the text. Raises ArgumentError where it is not to be had."""
    text = source.reveal()
    if text.startswith(_ENVIRONMENT):
        name = text.removeprefix(_ENVIRONMENT)
        found = os.environ.get(name, "")
        where = f"the environment variable {name}"
    elif text.startswith(FILE):
        path = Path(text.removeprefix(FILE))
        where = f"the file {path}"
        try:
            found = path.read_text("utf-8", errors="replace").strip()
        except OSError as error:
            raise ArgumentError(f"{where} cannot be read: {error.strerror}") from None
    else:
        return text
    if not found:
        raise ArgumentError(f"{where} is empty, or not set, where a replica runs")
    return found


def hindrance(source: Secret) -> str | None:
    """Return what keeps a process from opening a store, without its password; None if nothing."""
    return _asked(source, lambda url: connect_store(url, mode="r").close())


def models(source: Secret) -> list[str] | str:
    """Return the names of the models that can be served, one for each version; or what hinders."""
    return _asked(source, _served)


def _asked(source: Secret, ask: Callable[[str], _Told]) -> _Told | str:
    try:
        url = reveal(source)
    except PydedupError as error:
        return str(error)
    try:
        return ask(url)
    except MissingStoreError as error:
        said = error.told("`pydedup add` creates one")  # who serves opens none by a mode
    except PydedupError as error:
        said = str(error)
    return said.replace(url, redact(url))


def _served(url: str) -> list[str]:
    from pydedup.http.served import ServedStore

    with ServedStore.connect(url, _LEAST_MEMORY) as store:
        return [entry.name for entry in store.index() if not entry.hindrance]
