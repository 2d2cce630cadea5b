# SPDX-License-Identifier: Apache-2.0
"""What a copy has to do: which models, under which names, and where names are taken."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import get_args

from pydedup.adapter import Adapter, ModelRow
from pydedup.adapter_options import telling_rows
from pydedup.catalog import (
    ARTIFACT_DTYPE,
    Catalog,
    aliases_of,
    artifact_digests,
    certificate_of,
    wrong_aliases,
)
from pydedup.certificates import artifact_digest
from pydedup.errors import ArgumentError, CorruptStoreError, DuplicateError
from pydedup.maintenance.rows import lost_models
from pydedup.names import parse_address
from pydedup.text import listed
from pydedup.words import OnConflict, check_word

__all__ = ["SKIPPING", "Item", "plan_copy", "same_model"]

#: What may be done about damage.
SKIPPING = "; copying with skip_damaged (--skip-damaged) leaves out what is damaged"


@dataclass(slots=True)
class Item:
    """One model of a copy.

    Attributes
    ----------
    row
        As the source has it.
    aliases
        Those that it shall have at the destination.
    status
        ``"copy"``, ``"there"`` (the same model is), ``"skip"`` (another one is, and stays) or
        ``"replace"`` (another one is, and goes).
    replaces
        The id of the one that goes, else 0.
    moves_aliases
        Whether aliases that point to another version at the destination are to be moved.
    """

    row: ModelRow
    aliases: list[str]
    status: str = "copy"
    replaces: int = 0
    moves_aliases: bool = False

    @property
    def address(self) -> str:
        """``name@version``."""
        return self.row.address

    @property
    def is_wanted(self) -> bool:
        """Whether it is to be copied."""
        return self.status in ("copy", "replace")


def plan_copy(
    source: Adapter,
    target: Adapter | None,
    names: Sequence[str] | None,
    *,
    all_versions: bool,
    on_conflict: OnConflict,
    damaged: list[str] | None = None,
) -> list[Item]:
    """Return what there is to do, in the order in which the source got the models.

    Without a ``target`` nothing is in the way. With ``damaged``, rows of the source that cannot be
    read are left out, and it gets a sentence about each.

    Raises
    ------
    NotFoundError
        When the source has no model of one of the names.
    DuplicateError
        When names are taken at the destination and ``on_conflict`` is ``"error"``, or one is
        taken that can be neither skipped nor replaced.
    """
    check_word("on_conflict", on_conflict, get_args(OnConflict))
    with source.snapshot():
        with nullcontext() if damaged is None else telling_rows(source, damaged):
            rows = _chosen(source, names, all_versions)
            pointing = aliases_of(source)
            if names is None:
                _tell_lost(source, damaged)
        for row in rows:
            _refuse_wrong_aliases(row, pointing.get(row.id, []), damaged)
        moves = on_conflict == "replace"
        items = [Item(row, sorted(pointing.get(row.id, ())), moves_aliases=moves) for row in rows]
        if target is not None:
            with target.snapshot():
                _settle_clashes(items, source, target, on_conflict)
    return items


def same_model(ours: Adapter, a: ModelRow, theirs: Adapter, b: ModelRow) -> bool:
    """Whether two stores have the same under one name and version, artifacts included."""
    if (a.digest, a.policy, a.metadata, a.logical_bytes) != (
        b.digest,
        b.policy,
        b.metadata,
        b.logical_bytes,
    ):
        return False
    if not _same_promise(a, b):
        return False
    return _artifacts_of(ours, a) == _artifacts_of(theirs, b)


def _artifacts_of(adapter: Adapter, row: ModelRow) -> dict[str, tuple[str, object]]:
    """Return media types and digests of a model's artifacts; of those in blocks, as recorded."""
    in_blocks = {item.name for item in adapter.tensors(row.id) if item.dtype == ARTIFACT_DTYPE}
    recorded, found = artifact_digests(row), dict[str, tuple[str, object]]()
    for name, media_type in adapter.artifacts(row.id):
        if name in in_blocks:
            found[name] = media_type, recorded.get(name)
        else:
            found[name] = media_type, artifact_digest(adapter.artifact(row.id, name) or b"")
    return found


def _same_promise(a: ModelRow, b: ModelRow) -> bool:
    """Whether certificates promise the same; digests beside that, older versions did not record."""
    try:
        return a.certificate == b.certificate or certificate_of(a) == certificate_of(b)
    except CorruptStoreError:
        return False


def _refuse_wrong_aliases(row: ModelRow, pointing: list[str], damaged: list[str] | None) -> None:
    """Take away aliases that were not set to a model, and tell of them and of those it has lost.

    Raises CorruptStoreError where nobody is told: at the destination they would be right.
    """
    for alias, said in wrong_aliases(row, pointing).items():
        if damaged is None:
            raise CorruptStoreError(f"{said}{SKIPPING}")
        if said not in damaged:  # a plan is made twice
            damaged.append(said)
        if alias in pointing:
            pointing.remove(alias)


def _tell_lost(source: Adapter, damaged: list[str] | None) -> None:
    """Tell of models whose rows are lost; raises CorruptStoreError where nobody is told."""
    known = " ".join(damaged or ())
    for model_id in sorted(lost_models(source)):
        said = f"the row of the model with id {model_id} is lost, whose pages are there; run verify"
        if said in known or f"in the row of id {model_id}," in known:
            continue
        if damaged is None:
            raise CorruptStoreError(f"{source.url} is damaged: {said}{SKIPPING}")
        damaged.append(said)


def _chosen(source: Adapter, names: Sequence[str] | None, all_versions: bool) -> list[ModelRow]:
    if names is None:
        return source.models()
    catalog = Catalog(source)
    chosen: dict[int, ModelRow] = {}
    for name in names:
        row = catalog.resolve(name)
        versions = [row]
        if all_versions:
            if parse_address(name).selector is not None:
                raise ArgumentError(
                    f"{name!r} names one version; with all versions (all_versions=True, "
                    f"--all-versions) give the name alone: {row.name}"
                )
            versions = source.models(name=row.name)
        chosen.update((found.id, found) for found in versions)
    return [chosen[model_id] for model_id in sorted(chosen)]


def _settle_clashes(
    items: Sequence[Item], source: Adapter, target: Adapter, on_conflict: OnConflict
) -> None:
    there = {(row.name, row.version): row for row in target.models()}
    pointed = {(name, alias): model_id for name, alias, model_id in target.aliases()}
    clashes: list[str] = []
    for item in items:
        row = item.row
        other = there.get((row.name, row.version))
        if other is not None and same_model(target, other, source, row):
            item.status = "there"
        elif other is not None:
            item.status, item.replaces = on_conflict, other.id
            clashes.append(f"{item.address} (another model)")
        elif (row.name, row.version) in pointed:
            item.status = "skip"
            clashes.append(f"{item.address} (an alias)")
            if on_conflict == "replace":
                raise DuplicateError(
                    f"{target.url} has an alias {item.address}, which a version cannot replace; "
                    "delete or rename the alias there first"
                )
    for item in items:
        item.aliases, refused = _free_aliases(item, there, pointed, on_conflict)
        clashes += refused
    if clashes and on_conflict == "error":
        raise DuplicateError(
            f"{target.url} uses these names for something else: {listed(clashes)}; nothing was "
            "copied. on_conflict (--on-conflict) says whether to skip what is taken or to replace "
            "it"
        )


def _free_aliases(
    item: Item,
    there: dict[tuple[str, str], ModelRow],
    pointed: dict[tuple[str, str], int],
    on_conflict: OnConflict,
) -> tuple[list[str], list[str]]:
    """Return which aliases a model shall have, and what is said of the others."""
    name = item.row.name
    mine = there.get((name, item.row.version))
    free, refused = [], []
    for alias in item.aliases:
        taken = pointed.get((name, alias))
        if (name, alias) in there:
            refused.append(f"{name}@{alias} (a version)")
            if on_conflict == "replace":
                raise DuplicateError(
                    f"{name}@{alias} is an alias here and a version in the destination, which an "
                    "alias cannot replace; delete or rename the alias first"
                )
        elif taken is None or (mine is not None and taken == mine.id) or on_conflict == "replace":
            free.append(alias)
        else:
            refused.append(f"{name}@{alias} (an alias of another version)")
    return free, refused
