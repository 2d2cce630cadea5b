# SPDX-License-Identifier: Apache-2.0
"""Limits on what the models of one value of a metadata key may take; kept in ``meta``.

They hold for adds. `check` is asked about a state of the store that publishing then insists on
(its epoch, which setting a quota changes as well): so two adds never pass together what only one of
them may, and no lock is held while bytes are counted. Removing models is always allowed, even where
blocks that were shared then belong to one value alone and take it over its quota.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter, ModelRow
from pydedup.adapter_options import only_sound_rows
from pydedup.config import parse_bytes
from pydedup.errors import ArgumentError, CorruptStoreError, NotFoundError, QuotaError
from pydedup.pool import PagePool
from pydedup.text import listed
from pydedup.usage import Readers, marginal_bytes, text_of, value_of
from pydedup.words import Measure, check_word

__all__ = [
    "MEASURES",
    "QUOTAS_NAME",
    "Newcomers",
    "Quota",
    "Quotas",
    "check",
    "quota_of",
]

#: What a quota can limit.
MEASURES = get_args(Measure)

#: The row of ``meta`` that holds them.
QUOTAS_NAME = "quotas"


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit for the models whose metadata has ``value`` under ``key``.

    Attributes
    ----------
    value
        As `pydedup.usage.value_of` gives it; ``None``: each value that has no quota of its own.
    bytes
        The most that the models may take.
    measure
        ``"marginal"``, what removing them would free, or ``"logical"``, the size of their tensors.
    """

    key: str
    value: str | None
    bytes: int
    measure: Measure = "marginal"

    @property
    def subject(self) -> tuple[str, str | None]:
        """For whom it is; there is one quota for each."""
        return self.key, self.value

    def __str__(self) -> str:
        """Return for whom it is, as the command line takes it."""
        return self.key if self.value is None else f"{self.key}={self.value}"


@dataclass(frozen=True, slots=True)
class Newcomers:
    """Models that are about to be published.

    Attributes
    ----------
    models
        (metadata as JSON, logical bytes) of each.
    readers
        Returns what they use. Blocks that the store does not have yet are at negative places, whose
        costs ``Readers.costs`` knows. ``None``: nobody knows yet, and no quota of measure
        ``"marginal"`` is looked at.
    replaced
        Ids of stored models whose place they take.
    said
        What an error calls them.
    """

    models: Sequence[tuple[str, int]]
    readers: Callable[[], Readers] | None
    replaced: frozenset[int] = frozenset()
    said: str = "this add"


class Quotas:
    """The quotas of a store; iterating gives them, ordered by key and value."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def __repr__(self) -> str:
        return f"<pydedup.quotas.Quotas of {self._adapter.url}>"

    def __iter__(self) -> Iterator[Quota]:
        return iter(_read_quotas(self._adapter))

    def set(
        self, key: str, value: str | None, limit: int | str, *, measure: Measure = "marginal"
    ) -> Quota:
        """Limit what models with a value of a metadata key may take, from the next add on.

        Parameters
        ----------
        key, value
            For models with this value in their metadata; with ``None``, for those of each value
            that has no quota of its own. An empty value has none, but that one.
        limit
            Bytes, or text such as ``"1.5GB"``; 0 lets them have nothing. It may be below what there
            is already.
        measure
            ``"marginal"``: stored blocks that only they use, what removing them would free; what
            they share with others is free of charge. ``"logical"``: the size of their tensors.

        Raises
        ------
        ArgumentError, ReadOnlyError, ConflictError
        """
        key, value = _subject(key, value)
        if value == "":
            raise ArgumentError(
                f"{key}= names no value; leave out the '=' for a quota of each {key} that has none "
                "of its own"
            )
        check_word("measure", measure, MEASURES)
        size = 0 if str(limit).strip() == "0" else parse_bytes(limit)
        quota = Quota(key, value, size, measure)
        with self._adapter.transaction():
            self._adapter.bump_epoch()
            self._write([quota, *(other for other in self if other.subject != quota.subject)])
        return quota

    def remove(self, key: str, value: str | None) -> Quota:
        """Remove a quota and return it. Raises ArgumentError, NotFoundError, ReadOnlyError."""
        key, value = _subject(key, value)
        with self._adapter.transaction():
            self._adapter.bump_epoch()
            quotas = list(self)
            for quota in quotas:
                if quota.subject == (key, value):
                    self._write([other for other in quotas if other is not quota])
                    return quota
        known = listed([str(quota) for quota in quotas])
        raise NotFoundError(
            f"there is no quota for {Quota(key, value, 0)}; "
            + (f"there is one for: {known}" if known else "there is none at all")
        )

    def _write(self, quotas: Sequence[Quota]) -> None:
        text = json.dumps([asdict(quota) for quota in quotas], ensure_ascii=False)
        self._adapter.set_meta(QUOTAS_NAME, text)


def _read_quotas(adapter: Adapter) -> list[Quota]:
    """Return all quotas, ordered by key and value. Raises CorruptStoreError."""
    try:
        entries: list[Mapping[str, Any]] = json.loads(adapter.meta().get(QUOTAS_NAME, "[]"))
        for entry in entries:
            size, is_text = entry.get("bytes"), isinstance(entry.get("key"), str)
            is_known = is_text and entry.get("measure", MEASURES[0]) in MEASURES
            if not is_known or not isinstance(size, int) or size < 0:
                raise ValueError(f"{entry} is no quota")
        found = [Quota(**entry) for entry in entries]
        # Early ones may be for a number, where that of a model is looked up as text.
        found = [replace(quota, value=text_of(quota.value)) for quota in found]
        found.sort(key=lambda quota: (quota.key, quota.value is not None, quota.value or ""))
    except (ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise CorruptStoreError(
            f"{adapter.url} has quotas that do not parse ({exc}): row {QUOTAS_NAME!r} of its table "
            "meta; restore a backup"
        ) from exc
    return found


def _subject(key: Any, value: Any) -> tuple[str, str | None]:
    """Return for whom a quota is, the value as `pydedup.usage.value_of` gives that of a model."""
    if not isinstance(key, str) or not key:
        raise ArgumentError(f"a quota needs a key of metadata, such as 'tenant'; got {key!r}")
    try:
        said = text_of(value)
        (key + (said or "")).encode()
    except (TypeError, ValueError) as exc:
        raise ArgumentError(f"{key!r}: {value!r} is no metadata that a model can have") from exc
    return key, said


def quota_of(quotas: Sequence[Quota], key: str, value: str | None) -> Quota | None:
    """Return the quota that holds for models with this value; none for those without the key."""
    mine = {quota.value: quota for quota in quotas if quota.key == key}
    return None if value is None else mine.get(value, mine.get(None))


def check(adapter: Adapter, pool: PagePool, newcomers: Newcomers, epoch: int) -> bool:
    """Return whether the store is at this epoch, and its quotas allow these models.

    Raises
    ------
    QuotaError
        When they do not.
    """
    if not _read_quotas(adapter):
        return True  # or one is set from now on, and so the epoch changed
    with adapter.snapshot():
        if adapter.epoch() != epoch:
            return False
        concerned = list(_concerned(_read_quotas(adapter), newcomers))
        if not concerned:
            return True
        models = [row for row in adapter.models() if row.id not in newcomers.replaced]
        sizes = [m.logical_bytes for m in models] + [size for _, size in newcomers.models]
        new_readers = newcomers.readers
        if new_readers is None:
            concerned = [pair for pair in concerned if pair[0].measure == "logical"]
        together: Readers | None = None
        for quota, value in concerned:
            values = [value_of(m.metadata, quota.key, m.address) for m in models]
            values += [value_of(text, quota.key, "a new model") for text, _ in newcomers.models]
            is_mine = np.array([found == value for found in values])
            if new_readers is None or quota.measure == "logical":
                total = sum(itertools.compress(sizes, is_mine))
            else:
                together = together or _together(adapter, pool, models, new_readers())
                if _surely_fit(adapter, together, is_mine, quota.bytes):
                    continue
                total = marginal_bytes(together, is_mine)
            if total > quota.bytes:
                raise QuotaError(
                    f"with {newcomers.said}, {quota.key}={value} would take {total:,} bytes "
                    f"({quota.measure}), over its quota of {quota.bytes:,}; "
                    "remove models of it, or raise the quota"
                )
    return True


def _concerned(quotas: Sequence[Quota], newcomers: Newcomers) -> Iterator[tuple[Quota, str]]:
    """Yield the quotas that hold for newcomers, each with the value it holds for."""
    for key in dict.fromkeys(quota.key for quota in quotas):
        for value in dict.fromkeys(
            value_of(text, key, "a new model") for text, _ in newcomers.models
        ):
            quota = quota_of(quotas, key, value)
            if quota is not None and value is not None:
                yield quota, value


def _surely_fit(adapter: Adapter, readers: Readers, mine: NDArray[np.bool_], limit: int) -> bool:
    """Whether all pages that some of the readers use take no more than this, blocks of others too.

    No block map is read for it: there is one for each tensor of each version that they have.
    """
    rows = readers.rows[mine[readers.rows[:, 0]]]
    pages, at = np.unique(rows[:, 1], return_inverse=True)
    most = np.zeros(len(pages), np.int64)
    np.add.at(most, at, rows[:, 3])
    if most.sum() > limit:
        with only_sound_rows(adapter):
            stored = adapter.page_rows(ids=pages[pages > 0].tolist())
        held = np.searchsorted(pages, np.array([row.id for row in stored], np.int64))
        most[held] = np.minimum(most[held], [row.payload_bytes for row in stored])
    return int(most.sum()) <= limit


def _together(
    adapter: Adapter, pool: PagePool, models: Sequence[ModelRow], new: Readers
) -> Readers:
    """Return the readers of a store with new ones behind them."""
    stored, count = Readers.of_store(adapter, pool, models), len(models)
    moved = new.rows.copy()
    moved[:, 0] += count

    def costs(places: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.empty(len(places), np.int64)
        is_new = places < 0
        found[is_new] = new.costs(places[is_new])
        found[~is_new] = stored.costs(places[~is_new])
        return found

    def places_of(number: int) -> NDArray[np.int64]:
        return stored.places(number) if number < count else new.places(number - count)

    return Readers(np.concatenate([stored.rows, moved]), places_of, costs)
