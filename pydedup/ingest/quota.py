# SPDX-License-Identifier: Apache-2.0
"""What models of an add would use, as `pydedup.quotas` asks for it, before they are stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pydedup.errors import QuotaError
from pydedup.ingest.match import Matcher
from pydedup.ingest.staged import StagedModel
from pydedup.layout import pages_read
from pydedup.quotas import Newcomers, check
from pydedup.sets import distinct
from pydedup.usage import Readers

__all__ = ["BasesRefusedError", "check_quotas"]


class BasesRefusedError(QuotaError):
    """Quotas refuse blocks that are kept as bases of later ones; as deltas they may not."""


def check_quotas(
    matcher: Matcher, models: Sequence[StagedModel], epoch: int, said: str = "this add"
) -> bool:
    """Return whether the store is at this epoch, and its quotas allow the models of an add.

    When it is no more, nothing is known: publishing at that epoch will fail, too.

    Raises
    ------
    QuotaError
        When they do not; a `BasesRefusedError` where there are `Matcher.kept_bases`.
    """

    def references(number: int) -> NDArray[np.int64]:
        return distinct(models[number].references(matcher.reader))

    def places(number: int) -> NDArray[np.int64]:
        """Return places on pages, and -1, -2, ... for blocks 0, 1, ... of the spool."""
        found = references(number)
        is_new = found >= 0
        found[is_new] = -1 - found[is_new]
        found[~is_new] = matcher.stored.places(found[~is_new])
        return found

    def readers() -> Readers:
        rows = [
            (number, *row)
            for number in range(len(models))
            for row in pages_read(places(number), matcher.reader.costs_of(references(number)))
        ]
        table = np.array(rows, np.int64).reshape(-1, 4)
        return Readers(table, places, lambda new: matcher.spool.costs[-1 - new])

    described = [(m.metadata, m.logical_bytes) for m in models]
    replaced = frozenset(m.replaces for m in models)  # 0 is the id of no model
    newcomers = Newcomers(described, readers, replaced, said)
    try:
        return check(matcher.adapter, matcher.pool, newcomers, epoch)
    except QuotaError as error:
        if not matcher.kept_bases:
            raise
        raise BasesRefusedError(str(error)) from error
