# SPDX-License-Identifier: Apache-2.0
"""Changing what names mean: moving aliases, removing versions. Adding one is `pydedup.ingest`.

What a vacuum needs is not imported here: moving an alias takes less time than that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence

from pydedup.adapter import LIVE, RETIRED, STAGING, Adapter
from pydedup.adapter_options import only_sound_rows
from pydedup.catalog import (
    Catalog,
    added_as,
    aliases_of,
    known_versions,
    point_alias,
    recorded_aliases,
    version_of,
)
from pydedup.errors import ArgumentError, CorruptStoreError, NotFoundError
from pydedup.names import Address, check_name, parse_address
from pydedup.text import it_has, plural

__all__ = ["delete_models", "remove", "retire_pages", "set_alias"]


def set_alias(
    adapter: Adapter, catalog: Catalog, name: str, alias: str, version: str | None
) -> None:
    """Point an alias at a version, or delete it; see `pydedup.Store.alias`."""
    check_name(name, "model name")
    check_name(alias, "alias")
    if version is not None:
        check_name(version, "version")
    with adapter.transaction():
        adapter.bump_epoch()  # nobody removes the version meanwhile
        if version is None and point_alias(adapter, name, alias, None):
            return  # whatever it points at
        catalog.resolve(name)
        if version_of(adapter, name, alias) is not None:
            raise ArgumentError(f"{alias!r} is a version of {name}; choose another alias")
        if version is None:
            with only_sound_rows(adapter):
                known = [other for _, other, _ in adapter.aliases(name)]
            others = it_has(alias, known) if known else ", nor any other"
            raise NotFoundError(f"{name!r} has no alias {alias!r}{others}")
        row = version_of(adapter, name, version)
        if row is None:
            known = known_versions(adapter, name)
            raise NotFoundError(f"{name!r} has no version {version!r}{it_has(version, known)}")
        point_alias(adapter, name, alias, row.id)


def remove(
    adapter: Adapter,
    catalog: Catalog,
    name: str,
    *,
    all_versions: bool,
    keep: int | None,
    dry_run: bool,
) -> list[str]:
    """Remove one version or several; see `pydedup.Store.remove`."""
    with adapter.snapshot() if dry_run else adapter.transaction():
        if not dry_run:
            adapter.bump_epoch()
        if keep is None:
            doomed = _doomed(adapter, catalog, name, all_versions)
        else:
            doomed = _older(adapter, catalog, name, all_versions, keep)
        if dry_run:
            return list(doomed.values())
        delete_models(adapter, list(doomed))
    for model_id in doomed:
        catalog.forget(model_id)
    adapter.checkpoint()
    return list(doomed.values())


def retire_pages(adapter: Adapter, orphans: Sequence[int]) -> None:
    """Retire those of pages without an owner that are live; in the caller's transaction."""
    live = [row.id for row in adapter.page_rows(ids=orphans, state=LIVE)] if orphans else []
    if live:
        adapter.set_page_state(live, RETIRED, time.time())


def delete_models(adapter: Adapter, model_ids: Sequence[int]) -> None:
    """Delete models and retire the pages that none is left to read; in the caller's transaction."""
    with only_sound_rows(adapter):  # what damaged rows say of pages, a vacuum finds out
        rows = [row for model_id in model_ids for row in adapter.model_pages(model_id)]
    for model_id in model_ids:
        adapter.delete_model(model_id)
    retire_pages(adapter, adapter.orphan_pages([page_id for _, page_id, _, _ in rows]))


def _older(
    adapter: Adapter, catalog: Catalog, name: str, all_versions: bool, keep: int
) -> dict[int, str]:
    """Return the addresses of versions that are not among the newest, nor aliased, by id."""
    if type(keep) is not int or keep < 1:
        raise ArgumentError(
            f"keep must be a whole number of versions, 1 or more, not {keep!r:.100}; to remove "
            "all of them, use all_versions=True, --all-versions"
        )
    if all_versions or parse_address(name).selector is not None:
        raise ArgumentError(
            f"to keep {plural(keep, 'version')} (keep={keep}, --keep) give the name of a model "
            f"alone, not {'all versions too' if all_versions else repr(name)}"
        )
    catalog.resolve(name)
    aliased = aliases_of(adapter, name)
    rows = adapter.models(name=name)[:-keep]
    # An alias that is lost, or points elsewhere for damage, is recorded with its model.
    spared = {row.id for row in rows if row.id in aliased or recorded_aliases(row)}
    return {row.id: row.address for row in rows if row.id not in spared}


def _doomed(adapter: Adapter, catalog: Catalog, name: str, all_versions: bool) -> dict[int, str]:
    """Return the addresses of what is to be removed, by id."""
    address = parse_address(name)
    if address.selector is not None and all_versions:
        raise ArgumentError(
            f"{name!r} names one version; with all versions (all_versions=True, --all-versions) "
            "give the name alone"
        )
    try:
        row = catalog.resolve(name)
    except (CorruptStoreError, NotFoundError):
        doomed = dict.fromkeys(_damaged(adapter, address), str(address))
        if not doomed:
            raise
    else:
        doomed = {row.id: row.address}
        if address.selector is None:
            rows = adapter.models(name=address.name)
            if all_versions:
                return {each.id: each.address for each in rows}
            if len(rows) > 1:
                raise ArgumentError(
                    f"{name!r} has {len(rows)} versions; name one, e.g. {name}@{rows[0].version}, "
                    "or remove all (all_versions=True, --all-versions) or all but the newest "
                    "(keep=1, --keep 1)"
                )
        elif row.version != address.selector:
            raise ArgumentError(
                f"{name!r} is an alias of {row.address}; name the version to remove"
            )
    for _, alias, model_id in adapter.aliases(address.name):
        if model_id in doomed:
            raise ArgumentError(
                f"alias {alias!r} points at {doomed[model_id]}; move or delete the alias first"
            )
    return doomed


def _damaged(adapter: Adapter, address: Address) -> list[int]:
    """Return the ids of models of a version whose row is damaged, which nobody can read.

    Also of what was added as that version, and is called otherwise for damage.
    """
    if address.selector is None:
        return []
    found: list[int] = []

    def tell(table: str, key: Mapping[str, object], said: str) -> None:
        model_id = key.get("id")
        is_meant = (key.get("name"), key.get("version")) == (address.name, address.selector)
        if table == "models" and is_meant and isinstance(model_id, int):
            found.append(model_id)

    with only_sound_rows(adapter, tell):
        rows = adapter.models(state=None)
    wanted = str(address)
    quoted = json.dumps(wanted)  # there may be thousands of certificates
    of_no_state = [row for row in rows if row.state not in (LIVE, STAGING)]
    found += [row.id for row in of_no_state if row.address == wanted]
    others = [row for row in rows if row.state != STAGING and row.address != wanted]
    return found + [r.id for r in others if quoted in r.certificate and added_as(r) == wanted]
