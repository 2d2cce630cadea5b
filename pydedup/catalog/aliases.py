# SPDX-License-Identifier: Apache-2.0
"""Aliases, and what is recorded of them with the models that they point at: so a loss is told."""

from __future__ import annotations

import json
from collections.abc import Collection

from pydedup.adapter import Adapter, ModelRow
from pydedup.adapter_options import only_sound_rows
from pydedup.catalog.rows import recorded_certificate, with_recorded
from pydedup.certificates import ALIASES
from pydedup.errors import CorruptStoreError

__all__ = ["aliases_of", "point_alias", "recorded_aliases", "wrong_aliases"]


def aliases_of(adapter: Adapter, name: str | None = None) -> dict[int, list[str]]:
    """Return the aliases of models, by model id."""
    pointing: dict[int, list[str]] = {}
    for _, alias, model_id in adapter.aliases(name):
        pointing.setdefault(model_id, []).append(alias)
    return pointing


def recorded_aliases(row: ModelRow) -> list[str] | None:
    """Return the aliases that were set to a model; ``None`` where that is not known."""
    try:
        found = recorded_certificate(row).get(ALIASES)
    except CorruptStoreError:
        return None
    return [str(alias) for alias in found] if isinstance(found, list) else None


def wrong_aliases(row: ModelRow, pointing: Collection[str]) -> dict[str, str]:
    """Return what is to be said of each alias that points at a model but was not set to it.

    ``pointing`` are those that do; also of each that should and does not.
    """
    recorded = recorded_aliases(row)
    if recorded is None:
        return {}
    advice = "set it again, or restore a backup"
    moved = {
        alias: f"the alias {row.name}@{alias} points at version {row.version}, to which it was "
        f"not set; {advice}"
        for alias in pointing
        if alias not in recorded
    }
    lost = {
        alias: f"the alias {row.name}@{alias} is lost, which pointed at version {row.version}; "
        f"{advice}"
        for alias in recorded
        if alias not in pointing
    }
    return {**moved, **lost}


def point_alias(adapter: Adapter, name: str, alias: str, model_id: int | None) -> bool:
    """Set or move an alias, or delete it; returns whether there was one to delete.

    In a transaction of the caller. With a model that is not live yet it is not recorded.
    """
    is_there = True
    with only_sound_rows(adapter):
        pointing = adapter.aliases(name)
        before = [adapter.model(target) for _, other, target in pointing if other == alias]
    if model_id is None:
        is_there = adapter.delete_alias(name, alias)
    else:
        adapter.set_alias(name, alias, model_id)
    with only_sound_rows(adapter):
        if before and before[0] and alias in (recorded_aliases(before[0]) or ()):
            after = None if model_id in (None, before[0].id) else adapter.model(model_id)
            rows = [row for row in (before[0], after) if row is not None]
        else:  # a new one; or it was lost, and any version may have a record of it
            said = json.dumps(alias)  # there may be thousands of certificates
            rows = adapter.models(name=name)
            rows = [row for row in rows if row.id == model_id or said in row.certificate]
    for row in rows:
        recorded = recorded_aliases(row)
        if row.id == model_id:
            if recorded is None:  # of a model of before they were
                recorded = [other for _, other, target in pointing if target == row.id]
            wanted = sorted({*recorded, alias})
        elif recorded is not None and alias in recorded:
            is_there = True
            wanted = [other for other in recorded if other != alias]
        else:
            continue
        certificate = with_recorded(row.certificate, {ALIASES: wanted})
        if certificate != row.certificate:
            adapter.update_model(row.id, certificate=certificate)
    return is_there
