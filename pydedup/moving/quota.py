# SPDX-License-Identifier: Apache-2.0
"""Whether the quotas of a store allow all models of a copy, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

from pydedup.moving.plan import Item
from pydedup.moving.source import End
from pydedup.quotas import Newcomers, Quotas, check
from pydedup.usage import Readers

__all__ = ["check_room"]


def check_room(source: End, target: End, items: Sequence[Item]) -> None:
    """Raise QuotaError where not all models of a copy may be there at once.

    What they would share with models of the destination is not known before they are matched: where
    there are some, no quota of measure ``"marginal"`` is looked at. Each model is checked again
    when it comes.
    """
    epoch = target.adapter.epoch()
    wanted = [item for item in items if item.is_wanted]
    if not wanted or not list(Quotas(target.adapter)):
        return
    rows = sorted((item.row for item in wanted), key=lambda row: row.id)

    def readers() -> Readers:
        stored = Readers.of_store(source.adapter, source.pool, rows)
        moved = stored.rows.copy()
        moved[:, 1] = ~moved[:, 1]  # pages, as those of places that are negative
        return Readers(moved, lambda n: ~stored.places(n), lambda places: stored.costs(~places))

    newcomers = Newcomers(
        [(row.metadata, row.logical_bytes) for row in rows],
        None if target.adapter.models() else readers,
        frozenset(item.replaces for item in wanted),  # 0 is the id of no model
        f"a copy of {len(rows)} models",
    )
    with source.adapter.snapshot():
        check(target.adapter, target.pool, newcomers, epoch)
