# SPDX-License-Identifier: Apache-2.0
"""The copies of pages on shards, looked at and put back one by one (``RefillAdapter``).

Which of them are whole is for others to say. What is put back is a payload and no page: of one that
was deleted meanwhile it is what a killed writer leaves, and `compact` collects it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from pydedup.errors import CorruptStoreError, PydedupError, StoreError, UnavailableError

from . import _again
from ._errors import ConnectionLostError
from ._shard import Shard
from ._shards_list import ShardedList

__all__ = ["ShardedCopies"]

R = TypeVar("R")


class ShardedCopies(ShardedList):
    """The part of a sharded adapter that puts copies back."""

    def begin_refill(self) -> None:
        """Finish what a replacement that was cut off left; raises StoreError if the list changed.

        Raises also ReadOnlyError, ConflictError.
        """
        self._refuse_when_read_only()
        self.finish_replacing()

    def copy_places(self, page_ids: Sequence[int]) -> dict[str, list[int]]:
        """Return by place which of the pages should have a copy there."""
        found: dict[str, list[int]] = {}
        for page_id in page_ids:
            for shard_id in self._places(page_id):
                found.setdefault(shard_id, []).append(page_id)
        return found

    def place_name(self, place: str) -> str:
        """Return where a place is, for people."""
        return self._by_id[place].shown

    def present_copies(self, place: str, page_ids: Sequence[int]) -> set[int]:
        """Return of which of the pages there is a copy, whole or not. Raises UnavailableError."""
        shard = self._by_id[place]
        return self._patiently(shard, lambda: shard.present_payloads(page_ids))

    def read_copies(
        self, wanted: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, dict[int, bytes]], dict[str, PydedupError]]:
        """Return by place the copies that are there, and what is wrong with places that fail.

        A copy that the database itself refuses to read counts as one that is not there.
        """
        try:
            return self._again(lambda: self._read_copies(wanted, waits=True))
        except ConnectionLostError:
            return self._read_copies(wanted, waits=False)

    def _read_copies(
        self, wanted: Mapping[str, Sequence[int]], *, waits: bool
    ) -> tuple[dict[str, dict[int, bytes]], dict[str, PydedupError]]:
        problems: dict[str, PydedupError] = {}
        with self._asked(wanted, problems) as asked:
            pass
        found: dict[str, dict[int, bytes]] = {
            key: dict(one.rows) for key, one in asked.items() if key not in problems
        }
        for place, error in list(problems.items()):
            if isinstance(error, CorruptStoreError):
                del problems[place]
                found[place] = {}
                for page_id in wanted[place] if len(wanted[place]) > 1 else ():
                    copies, problem = self._read_copies({place: [page_id]}, waits=waits)
                    found[place] |= copies.get(place, {})
                    problems |= problem
            elif waits and self._is_worth_waiting(self._by_id[place], error):
                raise error
        return found, problems

    def write_copies(self, place: str, copies: Mapping[int, bytes]) -> None:
        """Put copies of pages in their place, in a transaction of their own.

        Raises StoreError when the list of shards was changed since this store was opened;
        UnavailableError, CorruptStoreError, StorageFullError, ConflictError.
        """
        self._check_list()
        shard = self._by_id[place]
        self._patiently(shard, lambda: shard.put_payloads(copies))

    # ---- inside -------------------------------------------------------------------------------

    def _patiently(self, shard: Shard, call: Callable[[], R]) -> R:
        """Return what a call returns; a shard that goes down is waited for, as readers do."""

        def tried() -> R:
            try:
                result = call()
            except StoreError as error:
                if shard.lost(error) and not isinstance(error, CorruptStoreError):
                    if self._is_worth_waiting(shard, error):
                        raise
                    raise UnavailableError(str(error)) from error
                raise
            shard.answered()
            return result

        return self._again(tried)

    @staticmethod
    def _is_worth_waiting(shard: Shard, error: PydedupError) -> bool:
        soon = (shard.down_seconds() or 0.0) < _again.AGAIN_SECONDS
        return soon and isinstance(error, ConnectionLostError)
