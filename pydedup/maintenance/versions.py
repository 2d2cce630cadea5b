# SPDX-License-Identifier: Apache-2.0
"""Changing what names mean: moving aliases, removing versions. Adding one is `pydedup.ingest`."""

from __future__ import annotations

from pydedup.adapter import Adapter, ModelRow
from pydedup.catalog import Catalog, known_versions, version_of
from pydedup.errors import ArgumentError, NotFoundError
from pydedup.maintenance.vacuum import retire_orphans
from pydedup.names import check_name, parse_address
from pydedup.text import it_has

__all__ = ["remove", "set_alias"]


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
        catalog.resolve(name)
        if version_of(adapter, name, alias) is not None:
            raise ArgumentError(f"{alias!r} is a version of {name}; choose another alias")
        if version is None:
            if not adapter.delete_alias(name, alias):
                raise NotFoundError(f"{name!r} has no alias {alias!r}")
            return
        row = version_of(adapter, name, version)
        if row is None:
            known = known_versions(adapter, name)
            raise NotFoundError(f"{name!r} has no version {version!r}{it_has(version, known)}")
        adapter.set_alias(name, alias, row.id)


def remove(adapter: Adapter, catalog: Catalog, name: str, *, all_versions: bool) -> list[str]:
    """Remove one version or all; see `pydedup.Store.remove`. Pages without owner are retired."""
    with adapter.transaction():
        adapter.bump_epoch()
        doomed = _doomed(adapter, catalog, name, all_versions)
        for row in doomed:
            adapter.delete_model(row.id)
        retire_orphans(adapter)
    for row in doomed:
        catalog.forget(row.id)
    adapter.checkpoint()
    return [f"{row.name}@{row.version}" for row in doomed]


def _doomed(adapter: Adapter, catalog: Catalog, name: str, all_versions: bool) -> list[ModelRow]:
    address = parse_address(name)
    row = catalog.resolve(name)
    if address.selector is None:
        rows = adapter.models(name=address.name)
        if all_versions:
            return rows
        if len(rows) > 1:
            raise ArgumentError(
                f"{name!r} has {len(rows)} versions; name one, e.g. {name}@{rows[0].version}, "
                "or remove all of them (all_versions=True, --all-versions)"
            )
    elif all_versions:
        raise ArgumentError(
            f"{name!r} names one version; with all versions (all_versions=True, --all-versions) "
            "give the name alone"
        )
    elif row.version != address.selector:
        raise ArgumentError(
            f"{name!r} is an alias of {row.name}@{row.version}; name the version to remove"
        )
    for _, alias, model_id in adapter.aliases(address.name):
        if model_id == row.id:
            raise ArgumentError(
                f"alias {alias!r} points at {row.name}@{row.version}; move or delete the alias "
                "first"
            )
    return [row]
