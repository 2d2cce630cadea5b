# SPDX-License-Identifier: Apache-2.0
"""What keeps a store in order and takes it elsewhere: a part of `Store`.

As in `pydedup.store`, what serving does not need is imported where it is used.
"""

from __future__ import annotations

import abc
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pydedup import registry
from pydedup.adapter import Adapter
from pydedup.adapter_options import tells_hidden, told_damage
from pydedup.catalog import Catalog
from pydedup.errors import ArgumentError, CorruptStoreError, UnavailableError
from pydedup.jobs import LEASE_SECONDS
from pydedup.names import check_path
from pydedup.opening import check_writable, connect_store, open_end
from pydedup.pool import PagePool
from pydedup.types import CopyReport, Progress, check_progress
from pydedup.words import FloatDType, OnConflict, OpenMode

if TYPE_CHECKING:
    from pydedup.maintenance.recheck import Evaluate
    from pydedup.maintenance.refill import RefillReport
    from pydedup.maintenance.vacuum import VacuumReport
    from pydedup.maintenance.verify import VerifyReport
    from pydedup.moving.source import End

__all__ = ["StoreUpkeep"]

# Budget of the store at the other end of a backup: only bases and blocks to compare are read there.
_OTHER_END_BYTES = 128 * 1024 * 1024


class StoreUpkeep(abc.ABC):
    """Checking, freeing and moving, of a store whose models can be loaded."""

    _adapter: Adapter
    _catalog: Catalog
    _pool: PagePool

    @abc.abstractmethod
    def load(self, name: str, dtype: FloatDType | None = None) -> dict[str, NDArray[Any]]:
        """Return all tensors of a model."""

    # ---- upkeep -------------------------------------------------------------------------------

    def verify(
        self,
        *,
        evaluate: Mapping[str, Evaluate] | None = None,
        repair_from: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> VerifyReport:
        """Check every page, block and block map against what was recorded.

        Changes nothing without ``repair_from``: the URL of another store on any database, a backup,
        or the file or folder of a model. Blocks of damaged pages are then restored from it by their
        hash, as far as it has them; ``repair`` of the report says which were, and which models
        still miss some. Rows that follow from others (what models read, which block is where) are
        rebuilt. Everything else is served meanwhile. The other findings describe the store after
        the repair.

        ``evaluate`` maps addresses of models that were added with `policies.Accuracy` to their
        metrics: they are evaluated again and compared with their certificates; what cannot be read
        is told among the other findings. Raises NotFoundError, ArgumentError (for a model of
        another policy) and EvaluationError for these.
        """
        check_progress(progress)
        metrics: object = evaluate
        if not isinstance(metrics, Mapping | None):
            raise ArgumentError(
                "evaluate must be a mapping of models to metrics, such as "
                f"{{'reviews@1': scores}}, not {type(metrics).__name__}"
            )
        from pydedup.maintenance.recheck import check_promise, recheck
        from pydedup.maintenance.verify import verify_store

        asked = dict(evaluate or {})
        with suppress(CorruptStoreError):  # which is told below
            for name in asked:
                check_promise(self._catalog.model(name))
        if repair_from is None:
            report = verify_store(self._adapter, progress=progress)
        else:
            check_writable(self._adapter, "repair")
            source = check_path(repair_from, "repair_from", or_url=True)
            report = self._repaired(source, progress)
        for number, (name, function) in enumerate(asked.items()):
            if progress is not None:  # it may take hours, and is not ours
                progress(f"evaluating {name}", number, len(asked))
            try:
                model = self._catalog.model(name)
                recheck(model, self.load(model.address), function, report)
            except CorruptStoreError as error:
                report.add_error(f"{name} cannot be evaluated: {error}")
            except UnavailableError as error:
                report.unreachable.append(f"{name} cannot be evaluated: {error}")
        return report

    @tells_hidden
    def vacuum(
        self,
        *,
        grace_seconds: float = 0.0,
        lease_seconds: float = LEASE_SECONDS,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> VacuumReport:
        """Free what nobody uses and repack where models read too many pages.

        Deltas on blocks of removed models are stored without these where that takes less; what
        models hold stays the same. With ``dry_run``, only report what that would save; the store
        may be open for reading only.

        Parameters
        ----------
        grace_seconds
            How long a page that was given up is kept for readers that may still ask for it. When a
            page is gone, readers look up again where a block is, so 0 is safe.
        lease_seconds
            After so long without a sign of life, an unfinished add or copy whose process is not
            known to be gone counts as abandoned. With 0, those under way do, too, and end with
            ConflictError.

        Raises
        ------
        ArgumentError
            For a grace or lease that is not a number of seconds, or negative.
        ReadOnlyError, ConflictError, StorageFullError, UnavailableError
        """
        from pydedup.maintenance.vacuum import plan_vacuum, vacuum_store

        check_progress(progress)
        given: dict[str, object] = {"grace_seconds": grace_seconds, "lease_seconds": lease_seconds}
        for name, value in given.items():
            if not isinstance(value, int | float | np.number) or not value >= 0:
                raise ArgumentError(f"{name} must be seconds, 0 or more, not {value!r:.100}")
        if dry_run:
            return plan_vacuum(
                self._adapter, self._pool, grace_seconds=grace_seconds, lease_seconds=lease_seconds
            )
        check_writable(self._adapter, "vacuum")
        report = vacuum_store(
            self._adapter,
            self._catalog,
            self._pool,
            grace_seconds=grace_seconds,
            lease_seconds=lease_seconds,
            progress=progress,
        )
        self._pool.clear()
        return report

    def refill(self, *, progress: Progress | None = None) -> RefillReport:
        """Put back each copy of a page that is missing or damaged, from one that is whole.

        For stores that keep each page in several places (`docs/sharding.md`); for all others there
        is nothing to put back, and ``copies`` of the report is 1. The store can be served, added to
        and vacuumed meanwhile. After an interruption, running it again does what is left.

        What could not be put back, for example because a place is full or accepts no changes, is
        in ``lost`` and ``failed`` of the report. Raises ReadOnlyError, ConflictError, and
        StoreError when a place was replaced since this store was opened.
        """
        from pydedup.maintenance.refill import refill_store

        check_progress(progress)
        check_writable(self._adapter, "put copies of pages back")
        return refill_store(self._adapter, progress=progress)

    @staticmethod
    def replace_lost(url: str, *, schema: str | None = None) -> tuple[str, str] | None:
        """Let a new, empty place in a store's URL take over from one that is lost for good.

        Returns where the lost one was and what took its place, without credentials; ``None`` when
        all places in the URL are the store's already. The lost one is refused from then on, should
        it come back. The new place is empty: open the store and call `refill`. See
        docs/sharding.md.

        Raises ArgumentError when no place is lost, more than one is or may be, the store keeps only
        one copy of each page, or the new place is not empty; ReadOnlyError, ConflictError,
        UnavailableError.
        """
        return registry.replace_lost(registry.place_of(url), schema=schema)

    # ---- moving -------------------------------------------------------------------------------

    @tells_hidden
    def copy_to(
        self,
        target: str | os.PathLike[str],
        names: str | Sequence[str] | None = None,
        *,
        all_versions: bool = False,
        on_conflict: OnConflict = "error",
        skip_damaged: bool = False,
        memory: str | int = "512MiB",
        schema: str | None = None,
        progress: Progress | None = None,
    ) -> CopyReport:
        """Copy models to another store of any database; it is created if it does not exist.

        An empty store gets the pages as they are, another one only the blocks that it does not
        have. What arrives is read back and compared with its hashes; then the model is published
        with its name, version, policy, certificate, metadata, aliases and source hashes. After a
        failure, run it again: models that are there are not copied again.

        Parameters
        ----------
        target
            URL, or path of a SQLite file.
        names
            One or several of ``name`` (its newest version), ``name@version`` and ``name@alias``;
            all models by default.
        all_versions
            Take all versions of ``names``.
        on_conflict
            What to do when the other store has another model under a ``name@version``, or another
            version under an alias: ``"error"`` (copy nothing), ``"skip"`` (leave it out) or
            ``"replace"`` (put the copy in its place).
        skip_damaged
            Leave out models that are damaged, and say so in ``damaged`` of the report, instead of
            ending there.
        memory, schema
            For the other store, as in `pydedup.open`.
        progress
            Called as ``progress(stage, done, total)``, in bytes.

        Raises
        ------
        NotFoundError, DuplicateError, ArgumentError, CorruptStoreError, ReadOnlyError,
        ConflictError, StorageFullError, UnavailableError
            Models that were published before the error stay.
        """
        from pydedup.moving.copy import copy_models
        from pydedup.moving.plan import plan_copy

        target = registry.place_of(target)
        check_progress(progress)
        if isinstance(names, str):
            names = (names,)
        elif isinstance(names, Iterable):
            names = tuple(names)  # which are gone through twice
        elif names is not None:
            raise ArgumentError(f"names must be names of models, or one, not {names!r}")
        damaged: list[str] | None = [] if skip_damaged else None
        plan = functools.partial(
            plan_copy,
            self._adapter,
            names=names,
            all_versions=all_versions,
            on_conflict=on_conflict,
            damaged=damaged,
        )
        plan(None)  # what is wrong with the names must not create a store
        with open_end(target, mode="a", memory=memory, schema=schema) as other:
            check_writable(other.adapter, "copy models there")
            items = plan(other.adapter)
            report = copy_models(self._end(), other, items, damaged=damaged, progress=progress)
        return self._copied(report)

    @tells_hidden
    def backup(
        self,
        path: str | os.PathLike[str],
        *,
        replace: bool = False,
        skip_damaged: bool = False,
        progress: Progress | None = None,
    ) -> CopyReport:
        """Write the whole store to one file, which is a store in SQLite.

        It appears under its name when it is complete and checked. A backup that was killed leaves
        ``NAME.partial``, which the next one continues. Reading and adding go on meanwhile; models
        added after the start are not in it. An existing file is only replaced with ``replace``, and
        never by a backup from which ``skip_damaged`` (see `copy_to`) left something out. Raises
        ArgumentError, ConflictError (another backup to that file is running) and what `copy_to`
        does.
        """
        from pydedup.moving.backup import backup_store

        check_progress(progress)
        report = backup_store(
            self._end(),
            path,
            _other_end,
            replace=replace,
            skip_damaged=skip_damaged,
            progress=progress,
        )
        return self._copied(report)

    def restore(
        self, path: str | os.PathLike[str], *, progress: Progress | None = None
    ) -> CopyReport:
        """Copy a backup into this store, which must be empty, or hold models of that backup alone.

        Raises ArgumentError when it has other models, NotAStoreError when the file is no backup,
        and what `copy_to` does.
        """
        from pydedup.moving.backup import restore_store

        check_progress(progress)
        check_writable(self._adapter, "restore a backup")
        return self._copied(restore_store(path, self._end(), _other_end, progress=progress))

    # ---- inside -------------------------------------------------------------------------------

    def _end(self) -> End:
        from pydedup.moving.source import End

        return End(self._adapter, self._pool)

    def _copied(self, report: CopyReport) -> CopyReport:
        """Return it, once the copy's memory is free again."""
        from pydedup._memory import give_back_after

        give_back_after(report.stored_bytes)
        return replace(report, damaged=told_damage(self._adapter, report.damaged))

    def _repaired(self, place: str, progress: Progress | None) -> VerifyReport:
        """Verify, repair what is damaged, and verify again."""
        from pydedup.maintenance.blocks_from import block_source
        from pydedup.maintenance.repair import repair
        from pydedup.maintenance.rows import forget_blocks, record_blocks, record_reads
        from pydedup.maintenance.verify import verify_store

        adapter, pool = self._adapter, self._pool
        connect = functools.partial(connect_store, mode="r")
        with block_source(place, connect, pool.memory_bytes) as source:
            report = verify_store(adapter, progress=progress)
            models = blocks = 0
            for _ in range(2):  # wrong rows of blocks hide that a model's reads are wrong, too
                models += record_reads(adapter, pool, report.wrong_readers)
                renewed = forget_blocks(adapter, report.surplus_blocks)
                renewed += record_blocks(adapter, pool, report.unrecorded_blocks)
                if not (report.wrong_readers or renewed):  # models may have been removed meanwhile
                    break
                blocks += renewed
                report = verify_store(adapter, progress=progress)
            damaged = report.damaged_pages
            done = repair(adapter, pool, damaged, source, progress=progress)
        if damaged:
            self._catalog.refresh()
            adapter.checkpoint()
            report = verify_store(adapter, progress=progress)
        report.repair = replace(done, recorded_models=models, recorded_blocks=blocks)
        return report


def _other_end(url: str, mode: OpenMode) -> AbstractContextManager[End]:
    return open_end(url, mode=mode, memory=_OTHER_END_BYTES)
