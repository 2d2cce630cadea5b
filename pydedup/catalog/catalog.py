# SPDX-License-Identifier: Apache-2.0
"""Addresses to models. Thread-safe."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterator
from contextlib import suppress
from typing import Final

from pydedup.adapter import Adapter, ModelRow
from pydedup.adapter_options import (
    ChangeMarkAdapter,
    hidden_rows,
    only_sound_rows,
    telling_rows,
)
from pydedup.catalog.aliases import aliases_of, wrong_aliases
from pydedup.catalog.model import StoredModel
from pydedup.catalog.pages import another_store
from pydedup.catalog.rows import SUGGESTED_MODELS, model_info
from pydedup.errors import CorruptStoreError, NotFoundError, PydedupError
from pydedup.names import Address, parse_address
from pydedup.pool import PagePool
from pydedup.text import did_you_mean, it_has
from pydedup.types import ModelInfo

__all__ = ["Catalog"]

# Of so many models, those asked for last, tensors and block maps are kept in memory, whatever they
# take; of more, as far as all that is kept fits the room.
_CACHED_MODELS: Final = 256
# The room: this share of the budget for pages, beside it, and at least so many bytes.
_ROOM_SHARE: Final = 16
_ROOM_BYTES: Final = 16 << 20
#: Addresses whose models are remembered until the database is changed.
_FOUND_MODELS: Final = 1024


class Catalog:
    """Finds models by address.

    ``pool`` is what models are given (`StoredModel`). The larger the budget for pages, the
    more small models are remembered.
    """

    def __init__(
        self,
        adapter: Adapter,
        pool: PagePool | None = None,
        budget_bytes: int = 0,
    ) -> None:
        self._adapter = adapter
        self._pool = pool
        self._room = max(budget_bytes // _ROOM_SHARE, _ROOM_BYTES)
        # No lock, which a fork could leave held: each use is one operation on the dict.
        self._models: OrderedDict[int, StoredModel] = OrderedDict()  # asked for last comes last
        self._unmeasured = 0
        self._store_id: str | None = None
        self._sound_aliases: set[tuple[int, str]] = set()
        self._found: OrderedDict[tuple[str, Hashable], ModelRow] = OrderedDict()
        self._change_mark = adapter.change_mark if isinstance(adapter, ChangeMarkAdapter) else None

    def resolve(self, address: str) -> ModelRow:
        """Return the live model that an address means.

        Raises
        ------
        ArgumentError
            When the address is malformed.
        NotFoundError
            When there is no such model, version or alias; the message names close ones.
        UnavailableError
            When another store has taken the place of the one that was opened.
        """
        row = self._find(address)
        self._cached(row)
        return row

    def _find(self, address: str) -> ModelRow:
        """Return `_look_for`, not asked again as long as nothing in the database was changed."""
        mark = None if self._change_mark is None else self._change_mark()
        if mark is None or not isinstance(address, str):
            return self._look_for(address)
        row = self._found.get((address, mark))
        if row is None:
            row = self._found[address, mark] = self._look_for(address)
            if len(self._found) > _FOUND_MODELS:
                with suppress(KeyError):
                    self._found.popitem(last=False)
        return row

    def _look_for(self, address: str) -> ModelRow:
        parsed = parse_address(address)
        called = self._called(parsed)
        while called is None:
            epoch = self._adapter.epoch()
            called = self._called(parsed)
            if called is None:
                error = self._not_found(parsed)
                if self._adapter.epoch() == epoch:  # else others published while it was looked for
                    raise error
        return called

    def _called(self, parsed: Address) -> ModelRow | None:
        """Return the version that is meant, if there is one. Raises CorruptStoreError."""
        if parsed.selector is None:
            rows = self._adapter.models(name=parsed.name, newest=1)
            return rows[-1] if rows else None
        row = self._adapter.model_called(parsed.name, parsed.selector)
        if row is not None and row.version != parsed.selector:
            self._check_alias(row, parsed.selector)
        return row

    def _not_found(self, parsed: Address) -> PydedupError:
        """Return what is to be raised about an address that nothing has."""
        rows = self._adapter.models(name=parsed.name, newest=SUGGESTED_MODELS)
        hidden = "".join(f"; but {said}" for said in hidden_rows(self._adapter))
        if not rows:
            names = sorted({row.name for row in self._adapter.models(newest=SUGGESTED_MODELS)})
            return NotFoundError(
                f"no model {parsed.name!r} in {self._adapter.url}"
                f"{did_you_mean(parsed.name, names)}{hidden}"
            )
        for row in rows:
            said = wrong_aliases(row, ()).get(str(parsed.selector))
            if said is not None:
                return CorruptStoreError(said)
        known = [row.version for row in rows]
        known += [alias for _, alias, _ in self._adapter.aliases(parsed.name)]
        return NotFoundError(
            f"{parsed.name!r} has no version or alias {parsed.selector!r}"
            f"{it_has(str(parsed.selector), known)}{hidden}"
        )

    def _check_alias(self, row: ModelRow, alias: str) -> None:
        """Raise CorruptStoreError where an alias was not set to the model that it points at.

        What was found in order is not looked at again.
        """
        if (row.id, alias) in self._sound_aliases:
            return
        said = wrong_aliases(row, [alias]).get(alias)
        if said is not None:
            raise CorruptStoreError(said)
        if len(self._sound_aliases) >= SUGGESTED_MODELS:
            self._sound_aliases.clear()
        self._sound_aliases.add((row.id, alias))

    def model(self, address: str) -> StoredModel:
        """Return the model of an address, with what is cached of it."""
        return self.of_row(self._find(address))

    def of_row(self, row: ModelRow) -> StoredModel:
        """Return the model of a row, with what is cached of it. Raises as `resolve` does."""
        model = self._cached(row)
        if model is None:
            self._refuse_another_store()
            model = StoredModel(self._adapter, row, self._pool)
            self._models[row.id] = model
            self._unmeasured += model.memory_bytes
            if self._unmeasured > self._room // 8:
                self._make_room()
        else:
            with suppress(KeyError):  # which was forgotten meanwhile
                self._models.move_to_end(row.id)
        return model

    def _make_room(self) -> None:
        """Forget models that were not asked for lately, if too many are remembered."""
        self._unmeasured = held = 0
        for number, model_id in enumerate(reversed(list(self._models))):
            model = self._models.get(model_id)
            held += 0 if model is None else model.memory_bytes
            if number >= _CACHED_MODELS and held > self._room:
                self._models.pop(model_id, None)

    def _cached(self, row: ModelRow) -> StoredModel | None:
        """Return the model of a row, if it is cached.

        Ids are given once in a store: where one means another model, tables were dropped and made
        anew, and what is cached, pages too, is of the store before.
        """
        model = self._models.get(row.id)
        if model is not None and model.row is not row and _is_other(model.row, row):
            raise another_store(self._adapter, self._pool)
        return model

    def _refuse_another_store(self) -> None:
        """Raise UnavailableError where a model that is not cached is of another store.

        What is cached of pages, whose ids begin anew with the tables, would be taken for its own.
        """
        if self._store_id is None:
            self._store_id = self._id_of_store()
        elif not self.is_of_this_store():
            raise another_store(self._adapter, self._pool)

    def is_of_this_store(self) -> bool:
        """Whether models are cached, of the store that has these tables now."""
        return self._store_id is not None and self._store_id == self._id_of_store()

    def _id_of_store(self) -> str | None:
        with only_sound_rows(self._adapter):
            return self._adapter.meta().get("store_id")

    @property
    def memory_bytes(self) -> int:
        """About how many bytes are remembered of models."""
        return sum(model.memory_bytes for model in list(self._models.values()))

    def infos(self, name: str | None = None) -> list[ModelInfo]:
        """Return what the store knows of its live models, ordered by name, then age."""
        return list(self._infos(name, None))

    def sound_infos(self, said: list[str]) -> list[ModelInfo]:
        """Return the same without models, or aliases, of which it cannot be read.

        ``said`` gets a sentence about each.
        """
        with telling_rows(self._adapter, said):
            return list(self._infos(None, said))

    def _infos(self, name: str | None, said: list[str] | None) -> Iterator[ModelInfo]:
        aliases = aliases_of(self._adapter, name)
        for row in sorted(self._adapter.models(name=name), key=lambda row: (row.name, row.id)):
            try:
                yield model_info(row, aliases.get(row.id, ()))
            except CorruptStoreError as exc:
                if said is None:
                    raise
                said.append(str(exc))

    def forget(self, model_id: int) -> None:
        """Drop what is cached of a model."""
        self._models.pop(model_id, None)

    def forget_others(self, model_ids: Container[int]) -> None:
        """Drop what is cached of all models but these."""
        for model_id in [number for number in self._models if number not in model_ids]:
            self.forget(model_id)

    def refresh(self) -> None:
        """Forget all block maps."""
        for model in list(self._models.values()):
            model.refresh()


def _is_other(one: ModelRow, other: ModelRow) -> bool:
    """Whether two rows of one id are of different models."""
    if one.digest == other.digest and math.isnan(one.created_at):  # in a damaged row
        return not math.isnan(other.created_at)
    return (one.created_at, one.digest) != (other.created_at, other.digest)
