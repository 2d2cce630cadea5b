# SPDX-License-Identifier: Apache-2.0
"""What is noted of a scoring until it ends: the version it stays on, and how far others are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydedup.adapter import Adapter
from pydedup.adapter_options import RowAdapter
from pydedup.catalog import Catalog, StoredModel, recorded_object
from pydedup.errors import CorruptStoreError, NotFoundError, PydedupError, ReadOnlyError
from pydedup.jobs import SCORING
from pydedup.names import parse_address

__all__ = ["Pin"]


class Pin:
    """The version that a scoring stays on: what its address meant when it began.

    An address that names a version needs nothing of that. For others there is a row of ``jobs``
    from the beginning to the end of the work; the same work is the same query, table and address,
    however the database is called.
    In it are the runs that may have written something, so that the last of those that wrote nothing
    takes it back. A run that is killed stays in it.
    """

    def __init__(
        self,
        adapter: Adapter,
        catalog: Catalog,
        rows: RowAdapter,
        table: str,
        query: str,
        address: str,
    ) -> None:
        self._adapter = adapter
        self._catalog = catalog
        self._address = address
        self._table = table
        own: object = adapter  # which most often has the rows, too
        place = "" if rows is own else rows.url
        self._work = [place, table, query.strip()]
        self._id = self._id_of(address)
        self._run = uuid.uuid4().hex
        self._pinned = False
        self.resumed = False

    def take(self, *, always: bool = False) -> StoredModel:
        """Return the model of the work. Raises NotFoundError, ReadOnlyError.

        ``always`` leaves a row, for `noted`, also where the version is named, if it can.
        """
        row = self._catalog.resolve(self._address)
        exact = parse_address(self._address).selector == row.version
        if exact and not (always and not self._adapter.read_only):
            return self._catalog.of_row(row)
        if self._adapter.read_only:
            raise ReadOnlyError(
                f"{self._address} may mean another version before the work ends, and "
                f"{self._adapter.url} is open for reading only, so that this cannot be noted "
                f"there; name the version: {row.address}"
            )
        with self._alone(self._id):
            spec = self._spec(self._id)
            if spec is None or (exact and spec["model"] != row.id):
                spec = {"kind": "score", "model": row.id, "address": row.address}
                spec |= {"table": self._table, "runs": []}
            else:
                self.resumed = True
            live = self._adapter.model(spec["model"])
            if live is None:
                raise NotFoundError(
                    f"the work began with {spec['address']}, which was removed; to go on with "
                    f"another version, name it: {row.address}; when that has ended, "
                    f"{self._address} is taken again"
                )
            # What an older pydedup noted names no runs, and some may have written.
            self._put(spec | {"runs": [*spec.get("runs", [""]), self._run]})
        self._pinned = True
        return self._catalog.of_row(live)

    def noted(self, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Change what is noted beside the version, in one transaction, and return it.

        Of a work that leaves no row, and of one that another run has ended, nothing is kept.
        """
        if not self._pinned:
            spec: dict[str, Any] = {}
            change(spec)
            return spec
        with self._alone(self._id):
            found = self._own()
            spec = found or {}
            change(spec)
            if found is not None:
                self._put(spec)
        return spec

    @contextlib.contextmanager
    def _alone(self, job: str) -> Iterator[None]:
        """Transaction in which no other run of the work reads or changes what is noted."""
        lock = f"{job}:lock"
        with self._adapter.transaction():
            self._adapter.put_job(lock, "{}", repr(time.time()), SCORING)  # others wait for its row
            yield
            self._adapter.delete_job(lock)

    def _id_of(self, address: str) -> str:
        work = json.dumps([*self._work, address])
        return f"score:{hashlib.sha256(work.encode()).hexdigest()[:32]}"

    def _own(self) -> dict[str, Any] | None:
        """Return what is noted, unless another run ended the work, and others began it again."""
        spec = self._spec(self._id)
        return spec if spec is not None and self._run in spec.get("runs", ()) else None

    def _spec(self, job: str) -> dict[str, Any] | None:
        found = next((row[1] for row in self._adapter.jobs() if row[0] == job), None)
        if found is None:
            return None
        what = f"the note {job!r} of a scoring"
        spec = recorded_object(found, what)
        model_id, runs = spec.get("model"), spec.get("runs", [])
        if not isinstance(model_id, int) or not isinstance(runs, list) or "address" not in spec:
            raise CorruptStoreError(f"{what} cannot be read ({found:.200}); restore a backup")
        return spec

    def _put(self, spec: Mapping[str, Any]) -> None:
        self._adapter.put_job(self._id, json.dumps(spec), repr(time.time()), SCORING)

    def end(self) -> None:
        """Forget the version: the work is done."""
        if self._pinned:
            with self._alone(self._id):
                if self._own() is not None:
                    self._adapter.delete_job(self._id)
        if not self._adapter.read_only:
            with contextlib.suppress(PydedupError):  # the work is done all the same
                self._forget_removed()

    def _forget_removed(self) -> None:
        """Forget what the work began with by other addresses, if it was removed.

        Runs by those names were told to name a version, and now that one has done the work.
        """
        name = parse_address(self._address).name
        aliases = (alias for _, alias, _ in self._adapter.aliases(name))
        ids = {self._id_of(name), *(self._id_of(f"{name}@{alias}") for alias in aliases)}
        for job in [row[0] for row in self._adapter.jobs() if row[0] in ids]:
            with self._alone(job):
                spec = self._spec(job)
                if spec is not None and self._adapter.model(spec["model"]) is None:
                    self._adapter.delete_job(job)

    def take_back(self) -> None:
        """Forget the version of a run that wrote nothing, unless it is that of other runs too."""
        if not self._pinned:
            return
        with self._alone(self._id):
            spec = self._own()
            if spec is not None:
                spec["runs"].remove(self._run)
                if spec["runs"]:
                    self._put(spec)
                else:
                    self._adapter.delete_job(self._id)
