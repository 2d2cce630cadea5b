# SPDX-License-Identifier: Apache-2.0
"""The calls on what describes models: meta, models, aliases, artifacts, tensors, maps and jobs.

Rows of pages and blocks, whose number grows with the weights, are in ``_dbapi``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydedup._pages import join_parts, split_payload
from pydedup.adapter import LIVE, ModelRow, TensorRow
from pydedup.errors import CorruptStoreError, DuplicateError

from ._base import DbApiBase, check_state
from ._errors import KeyTakenError
from ._schema import TABLES
from ._values import Row, as_number

__all__ = ["CatalogCalls"]

#: Artifacts are stored in parts of this size, as block maps are (`pydedup.blocks.PART_BYTES`).
ARTIFACT_PART_BYTES = 4_000


class CatalogCalls(DbApiBase):
    """The part of the adapter protocol that moves descriptions."""

    # ---- meta ---------------------------------------------------------------------------------

    def meta(self) -> dict[str, str]:
        """Return all of ``meta``."""
        return dict(self._recorded("meta", self._sql.meta))

    def set_meta(self, name: str, value: str) -> None:
        """Insert or replace one value."""
        self._write(self._sql.set_meta, [name, value])

    def epoch(self) -> int:
        """Return the epoch."""
        found = self._recorded("meta", self._sql.meta_value, ["epoch"], ["value"])
        value = found[0][0] if found else None
        epoch = None if value is None else as_number(value)
        if epoch is None:
            raise CorruptStoreError(
                f"{self._url} has {value!r:.40} as its epoch where a number must be; restore a "
                "backup"
            )
        return epoch

    def bump_epoch(self, expected: int | None = None) -> bool:
        """Add one to the epoch, if it is the one expected; returns whether it was."""
        if expected is None:
            changed = self._write(self._sql.bump_epoch)
        else:
            changed = self._write(self._sql.bump_epoch_from, [str(expected)])
        if not changed:
            self.epoch()  # raises when there is none
        return changed > 0

    # ---- models -------------------------------------------------------------------------------

    def insert_model(self, row: ModelRow, *, replaces: int = 0) -> int:
        """Insert and return the id."""
        check_state(row.state)
        self._sized(row.metadata.encode(), f"the metadata of {row.address}")
        taken = DuplicateError(_taken(row.name, row.version))
        values = [getattr(row, column) for column in TABLES["models"].names[1:]]
        with self._writer():
            rivals = self._query(self._sql.live_model, [row.name, row.version, LIVE])
            if any(rival != replaces for (rival,) in rivals):
                raise taken
            try:
                return self._insert(self._sql.insert_model, values)
            except KeyTakenError as error:
                raise taken from error

    def update_model(
        self,
        model_id: int,
        *,
        state: str | None = None,
        certificate: str | None = None,
        logical_bytes: int | None = None,
        digest: bytes | None = None,
        created_at: float | None = None,
    ) -> bool:
        """Change what is given; returns whether the row existed."""
        given = {
            "state": state,
            "created_at": created_at,
            "certificate": certificate,
            "logical_bytes": logical_bytes,
            "digest": digest,
        }
        changes = {column: value for column, value in given.items() if value is not None}
        if state is not None:
            check_state(state)
        with self._writer():
            if not changes:
                return bool(self._query(self._sql.model_exists, [model_id]))
            if state == LIVE:
                rivals = self._recorded(
                    "models", self._sql.live_rival, [model_id], ["name", "version"]
                )
                for name, version in rivals:
                    raise DuplicateError(_taken(name, version))
            try:
                sql = self._sql.update_model(list(changes))
                return self._write(sql, [*changes.values(), model_id]) > 0
            except KeyTakenError as error:
                raise DuplicateError(
                    f"the name and version of the model with id {model_id} were taken meanwhile"
                ) from error

    def models(
        self, *, name: str | None = None, state: str | None = LIVE, newest: int | None = None
    ) -> list[ModelRow]:
        """Return model rows by ascending id; ``state=None`` means all states."""
        if state is not None:
            check_state(state)
        sql = self._sql.models(name=name is not None, state=state, newest=newest is not None)
        parameters = [value for value in (name, newest) if value is not None]
        rows = [ModelRow(*row) for row in self._recorded("models", sql, parameters)]
        return rows if newest is None else rows[::-1]

    def model(self, model_id: int) -> ModelRow | None:
        """Return one live model."""
        rows = self._recorded("models", self._sql.model, [model_id])
        return ModelRow(*rows[0]) if rows else None

    def model_called(self, name: str, selector: str) -> ModelRow | None:
        """Return the live model of a name with a version, or else an alias."""
        asked = [name, selector, name, name, selector]
        found = [ModelRow(*row) for row in self._recorded("models", self._sql.models_called, asked)]
        rows = sorted(found, key=lambda row: row.version != selector)
        return rows[0] if rows else None

    def delete_model(self, model_id: int) -> None:
        """Delete the row and what belongs to it."""
        for statement in self._sql.delete_model:
            self._write(statement, [model_id])

    def aliases(self, name: str | None = None) -> list[tuple[str, str, int]]:
        """Return (name, alias, model_id), ordered."""
        if name is None:
            return self._recorded("aliases", self._sql.aliases)
        return self._recorded("aliases", self._sql.aliases_of, [name])

    def set_alias(self, name: str, alias: str, model_id: int) -> None:
        """Insert or move an alias."""
        self._write(self._sql.set_alias, [name, alias, model_id])

    def delete_alias(self, name: str, alias: str) -> bool:
        """Delete; returns whether it existed."""
        return self._write(self._sql.delete_alias, [name, alias]) > 0

    def insert_artifacts(self, model_id: int, items: Iterable[tuple[str, str, bytes]]) -> None:
        """Insert (name, media_type, payload), large ones in parts."""
        part_bytes = min(ARTIFACT_PART_BYTES, self.capabilities.max_payload_bytes)
        for name, media_type, payload in items:
            parts = split_payload(payload, part_bytes)
            self._insert_many(
                "artifacts", [(model_id, name, i, media_type, part) for i, part in enumerate(parts)]
            )

    def artifacts(self, model_id: int) -> list[tuple[str, str]]:
        """Return (name, media_type), ordered by name."""
        columns = ["name", "media_type"]
        rows = self._recorded("artifacts", self._sql.artifacts, [model_id], columns)
        return list({name: (name, media_type) for name, media_type in rows}.values())

    def artifact(self, model_id: int, name: str) -> bytes | None:
        """Return one payload. Raises CorruptStoreError where a part before the last is missing."""
        columns = ["part", "payload"]
        parts = self._recorded("artifacts", self._sql.artifact, [model_id, name], columns)
        if [number for number, _ in parts] != list(range(len(parts))):
            raise CorruptStoreError(
                f"{self._url} is damaged: a part of {name!r} of the model with id {model_id} is "
                "missing; restore a backup"
            )
        return join_parts(part for _, part in parts) if parts else None

    # ---- tensors and block maps ---------------------------------------------------------------

    def insert_tensors(self, rows: Iterable[TensorRow]) -> None:
        """Insert tensor rows."""
        columns = TABLES["tensors"].names
        self._insert_many("tensors", ([getattr(row, column) for column in columns] for row in rows))

    def tensors(self, model_id: int) -> list[TensorRow]:
        """Return tensor rows by ordinal."""
        rows = self._recorded("tensors", self._sql.tensors, [model_id])
        return [TensorRow(*row) for row in rows]

    def tensors_of(self, model_ids: Sequence[int]) -> list[TensorRow]:
        """Return tensor rows of several models, by model and ordinal."""
        found: list[Row] = []
        for piece in self._members(model_ids):
            of_models, order = ("model_id", len(piece)), ("model_id", "ordinal")
            sql = self._sql.select("tensors", members=of_models, order=order)
            found += self._recorded("tensors", sql, piece)
        return [TensorRow(*row) for row in found]

    def insert_block_maps(self, rows: Iterable[tuple[int, int, int, bytes]]) -> None:
        """Insert (model_id, ordinal, part, payload)."""
        self._insert_parts("block_maps", rows)

    def replace_block_maps(self, model_id: int, maps: Mapping[int, Sequence[bytes]]) -> None:
        """Replace all parts of some tensors, by ordinal."""
        of_model = self._sql.delete("block_maps", ("model_id",))
        for piece in self._members(list(maps), reserved=1):
            sql = f"{of_model} AND ordinal {self._sql.members(len(piece))}"
            self._write(sql, [model_id, *piece])
        self.insert_block_maps(
            (model_id, ordinal, number, part)
            for ordinal, parts in maps.items()
            for number, part in enumerate(parts)
        )

    def block_map(self, model_id: int, ordinal: int) -> list[bytes]:
        """Return the parts of one tensor in order."""
        asked = [model_id, ordinal]
        rows = self._recorded("block_maps", self._sql.block_map, asked, ["payload"])
        return [payload for (payload,) in rows]

    def block_maps(self, model_id: int) -> list[tuple[int, bytes]]:
        """Return (ordinal, payload) of all parts of a model, by ordinal and part."""
        columns = ["ordinal", "payload"]
        return self._recorded("block_maps", self._sql.block_maps, [model_id], columns)

    def block_maps_of(self, model_ids: Sequence[int]) -> list[tuple[int, int, bytes]]:
        """Return (model_id, ordinal, payload) of all parts of several models, in that order."""
        found: list[Row] = []
        columns, order = ["model_id", "ordinal", "payload"], ("model_id", "ordinal", "part")
        for piece in self._members(model_ids):
            of_models = ("model_id", len(piece))
            sql = self._sql.select("block_maps", columns, members=of_models, order=order)
            found += self._recorded("block_maps", sql, piece, columns)
        return found

    def insert_source_hashes(self, rows: Iterable[tuple[int, int, int, bytes]]) -> None:
        """Insert (model_id, ordinal, part, payload)."""
        self._insert_parts("source_hashes", rows)

    def source_hashes(self, model_id: int, first: int, stop: int) -> list[tuple[int, bytes]]:
        """Return (ordinal, payload) of the parts of ``first <= ordinal < stop``, in order."""
        asked, columns = [model_id, first, stop], ["ordinal", "payload"]
        return self._recorded("source_hashes", self._sql.source_hashes, asked, columns)

    def _insert_parts(self, table: str, rows: Iterable[tuple[int, int, int, bytes]]) -> None:
        what = f"a part of {table}"
        self._insert_many(table, ((*row[:3], self._sized(row[3], what)) for row in rows))

    # ---- jobs ---------------------------------------------------------------------------------

    def put_job(self, job_id: str, spec: str, cursor: str, state: str) -> None:
        """Insert or replace a job."""
        self._write(self._sql.put_job, [job_id, spec, cursor, state])

    def jobs(self) -> list[tuple[str, str, str, str]]:
        """Return (id, spec, cursor, state) ordered by id."""
        return self._recorded("jobs", self._sql.jobs)

    def delete_job(self, job_id: str) -> None:
        """Delete a job."""
        self._write(self._sql.delete_job, [job_id])


def _taken(name: str, version: str) -> str:
    return (
        f"the store has a model {name}@{version} already; add another version, or remove that one "
        "first"
    )
