# SPDX-License-Identifier: Apache-2.0
"""Which replica is the home of which family. Knows nothing of Ray."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Mapping

__all__ = ["Placement", "key_of", "weight_of"]

#: Families whose home is remembered; of others, it is decided again.
_REMEMBERED = 16_384
_UNIT = 1024


def key_of(name: str, nbytes: int) -> str:
    """Return what a family is called on its way to its home: who it is, and how large.

    The size is rounded up to a power of two, so that a family that grows keeps its name for long.
    """
    size = max(nbytes - 1, 0) // _UNIT
    return f"{name}~{1 << size.bit_length()}KiB"


def weight_of(key: str) -> int:
    """Return the size that a key tells, in KiB; 1 where it tells none."""
    size = key.rpartition("~")[2].removesuffix("KiB")
    return max(int(size), 1) if size.isascii() and size.isdigit() else 1


class Placement:
    """Homes of families, even by size, and changed no more than replicas that come and go need.

    Not safe between threads: a router decides in its event loop.
    """

    def __init__(self) -> None:
        self._homes: OrderedDict[str, str] = OrderedDict()
        self._loads: dict[str, int] = {}

    def home(self, key: str, replicas: Mapping[str, Collection[str]]) -> str:
        """Return the replica that serves a family.

        Parameters
        ----------
        key
            As `key_of` makes it.
        replicas
            The replicas that there are, at least one, each with the families that it has served:
            where another router has put a family, this one does.
        """
        if self._loads.keys() != replicas.keys():
            self._settle(replicas)
        home = self._homes.get(key)
        if home is None:
            holders = [name for name, held in replicas.items() if key in held]
            home = min(holders or replicas, key=lambda name: (self._loads[name], _draw(key, name)))
            self._homes[key] = home
            self._loads[home] += weight_of(key)
            if len(self._homes) > _REMEMBERED:
                oldest, at = self._homes.popitem(last=False)
                self._loads[at] -= weight_of(oldest)
        else:
            self._homes.move_to_end(key)
        return home

    def _settle(self, replicas: Collection[str]) -> None:
        """Forget homes at replicas that are gone, and give new replicas their part."""
        come = [name for name in replicas if name not in self._loads]
        self._homes = OrderedDict(
            (key, name) for key, name in self._homes.items() if name in replicas
        )
        self._loads = dict.fromkeys(replicas, 0)
        for key, name in self._homes.items():
            self._loads[name] += weight_of(key)
        for new in sorted(come):
            self._fill(new)

    def _fill(self, new: str) -> None:
        """Move families to a replica from the fullest ones, while that makes it more even."""
        while True:
            full = max(self._loads, key=lambda name: (self._loads[name], name))
            gap = self._loads[full] - self._loads[new]
            fitting = [
                (-weight_of(key), _draw(key, new), key)
                for key, name in self._homes.items()
                if name == full and weight_of(key) < gap
            ]
            if full == new or not fitting:
                return
            weight, _, key = min(fitting)
            self._homes[key] = new
            self._loads[full] += weight
            self._loads[new] -= weight


def _draw(key: str, replica: str) -> bytes:
    """Return a lot that every router draws alike."""
    return hashlib.blake2b(f"{key}\0{replica}".encode(), digest_size=8).digest()
