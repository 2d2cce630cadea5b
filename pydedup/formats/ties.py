# SPDX-License-Identifier: Apache-2.0
"""Tied tensors: one that a model has under several names, as an embedding and an output layer.

They have the same blocks in a store anyway, but so have others that are merely equal, such as the
scales of new norms, which become one for nobody. So what was tied is recorded beside the model.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping

from pydedup.errors import CorruptStoreError
from pydedup.formats.base import DERIVED, Artifact, TensorEntry

__all__ = ["TIES", "copies", "first_names", "record"]

#: The artifact with the names of tied tensors, those of one in one list.
TIES = DERIVED + "ties.json"


def _tied(entries: Iterable[TensorEntry]) -> list[list[str]]:
    groups: dict[Hashable, list[str]] = {}
    for entry in entries:
        if entry.nbytes:
            groups.setdefault((entry.key, entry.dtype, entry.shape), []).append(entry.name)
    return [names for names in groups.values() if len(names) > 1]


def copies(entries: Iterable[TensorEntry]) -> list[str]:
    """Return the names of what is written once more by a format that knows no ties."""
    return [name for names in _tied(entries) for name in names[1:]]


def record(entries: Iterable[TensorEntry]) -> Artifact | None:
    """Return what is kept of the ties of a model, if it has any."""
    tied = _tied(entries)
    return Artifact(TIES, "application/json", json.dumps(tied).encode()) if tied else None


def first_names(payload: bytes | None, shapes: Mapping[str, object]) -> dict[str, str]:
    """Return the first of its names for each tied tensor.

    ``shapes`` has what must be equal of tied tensors, by name. Raises CorruptStoreError for a
    record that is none.
    """
    try:
        groups: list[list[str]] = [] if payload is None else json.loads(payload)
        for names in groups:
            if len({repr(shapes[name]) for name in names}) != 1:
                raise ValueError(f"{names!r:.80} differ")
        return {name: names[0] for names in groups for name in names}
    except (KeyError, TypeError, ValueError) as exc:
        raise CorruptStoreError(
            f"the record of the model's tied tensors is damaged ({exc}); restore a backup"
        ) from exc
