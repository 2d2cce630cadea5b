# SPDX-License-Identifier: Apache-2.0
"""Which models belong together because they share pages, as the front needs it.

A hint alone: what an address means is decided where it is predicted, so that this may be some
seconds old, and need not know a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pydedup.adapter import Adapter
from pydedup.adapter_options import only_sound_rows
from pydedup.ray.serving.placement import key_of
from pydedup.report.families import families

__all__ = ["Families", "group"]

#: Models that are compared with each other, in a second or so; of more, versions of a name are
#: one, and of more names, the rest are families of their own.
_MOST = 1000


class Families:
    """The family of each address of a store.

    Parameters
    ----------
    adapter
        Of the store; closed by the caller.
    most_bytes
        Bytes of pages that a family may have; larger ones are split.
    """

    def __init__(self, adapter: Adapter, most_bytes: int) -> None:
        self._adapter = adapter
        self._most_bytes = most_bytes
        self._seen: object = None
        self._keys: dict[str, str] = {}

    def key(self, address: str) -> str:
        """Return the family of an address; one of its own where the address is unknown."""
        found = self._keys.get(address)
        return key_of(address.partition("@")[0], 0) if found is None else found

    def refresh(self) -> bool:
        """Look at the store again, which may wait for the database; returns whether it changed."""
        with only_sound_rows(self._adapter):  # the others are served
            rows = self._adapter.models()
            aliases = self._adapter.aliases()
        seen = self._adapter.epoch(), tuple(row.id for row in rows), tuple(aliases)
        if seen == self._seen:
            return False
        by_name: defaultdict[str, list[int]] = defaultdict(list)
        for row in rows:
            by_name[row.name].append(row.id)
        pages: dict[int, dict[int, int]] = {row.id: {} for row in rows}
        for model, page, _, nbytes in self._adapter.model_pages():
            if model in pages:  # not of one that is being removed
                pages[model][page] = nbytes
        by_id = {row.id: row.address for row in rows}
        key_of_id = {
            model: key_of(by_id[members[0]], nbytes)
            for members, nbytes in _families(pages, list(by_name.values()), self._most_bytes)
            for model in members
        }
        keys = {by_id[model]: key for model, key in key_of_id.items()}
        keys |= {name: key_of_id[models[-1]] for name, models in by_name.items()}
        keys |= {
            f"{name}@{alias}": key_of_id[model]
            for name, alias, model in aliases
            if model in key_of_id
        }
        self._keys, self._seen = keys, seen
        return True


def _families(
    pages: Mapping[int, Mapping[int, int]], names: Sequence[list[int]], most_bytes: int
) -> list[tuple[list[int], int]]:
    """Return families of models with their bytes; members ascending, so the oldest is first."""
    units = [[model] for model in pages] if len(pages) <= _MOST else list(names)
    used = [
        {page: nbytes for model in unit for page, nbytes in pages[model].items()} for unit in units
    ]
    return [
        (sorted(model for one in members for model in units[one]), nbytes)
        for members, nbytes in group(used, most_bytes)
    ]


def group(used: Sequence[Mapping[int, int]], most_bytes: int) -> list[tuple[list[int], int]]:
    """Group models by the pages that they share.

    Those with anything in common are one group (`pydedup.report.families.families`), as long as it
    has at most ``most_bytes``; larger ones are cut where little is shared.

    Parameters
    ----------
    used
        Of each model its pages, and how many bytes of each it uses.

    Returns
    -------
    list
        Groups, as indices of models, each with the bytes of its pages, and none twice.
    """
    sizes: dict[int, int] = {}
    owners: defaultdict[int, list[int]] = defaultdict(list)
    for number, pages in enumerate(used):
        for page, nbytes in pages.items():
            sizes[page] = max(sizes.get(page, 0), nbytes)
            if number < _MOST:
                owners[page].append(number)
    count = min(len(used), _MOST)
    classes: defaultdict[tuple[int, ...], int] = defaultdict(int)
    for page, mine in owners.items():
        classes[tuple(mine)] += sizes[page]
    common = np.zeros((count, count), np.int64)
    for mine, nbytes in ((list(key), size) for key, size in classes.items()):
        common[np.ix_(mine, mine)] += nbytes
    found: list[tuple[list[int], int]] = []
    for members in families(common, 1):
        for chosen in _cut(members, used, sizes, common, most_bytes):
            found.append((chosen, sum(sizes[page] for page in _pages_of(chosen, used))))
    found += [([one], sum(used[one].values())) for one in range(count, len(used))]
    return found


def _cut(
    members: list[int],
    used: Sequence[Mapping[int, int]],
    sizes: Mapping[int, int],
    common: NDArray[np.int64],
    most_bytes: int,
) -> list[list[int]]:
    """Cut a row of models, similar ones side by side, into rows that are small enough.

    Where a row is full, it ends between the two neighbours of its second half that have the least
    in common.
    """
    rows: list[list[int]] = []
    while members:
        pages: set[int] = set()
        nbytes = 0
        for end, one in enumerate(members):
            nbytes += sum(sizes[page] for page in used[one].keys() - pages)
            if end and nbytes > most_bytes:
                break
            pages |= used[one].keys()
        else:
            end = len(members)
        if end < len(members):
            places = range(end, end // 2, -1)
            end = min(places, key=lambda at: common[members[at - 1], members[at]])
        rows.append(members[:end])
        members = members[end:]
    return rows


def _pages_of(members: list[int], used: Sequence[Mapping[int, int]]) -> set[int]:
    return {page for one in members for page in used[one]}
