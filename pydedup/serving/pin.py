# SPDX-License-Identifier: Apache-2.0
"""What is noted of a scoring until it ends: the version it stays on, and how far others are."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from pydedup.adapter import Adapter
from pydedup.catalog import Catalog, StoredModel
from pydedup.errors import NotFoundError, ReadOnlyError
from pydedup.jobs import SCORING
from pydedup.names import parse_address

__all__ = ["Pin"]


class Pin:
    """The version that a scoring stays on: what its address meant when it began.

    An address that names a version needs nothing of that. For others there is a row of ``jobs``
    from the beginning to the end of the work; the same work is the same query, table and address.
    """

    def __init__(
        self, adapter: Adapter, catalog: Catalog, url: str, table: str, query: str, address: str
    ) -> None:
        self._adapter = adapter
        self._catalog = catalog
        self._address = address
        self._table = table
        work = json.dumps([url, table, " ".join(query.split()), address])
        self._id = f"score:{hashlib.sha256(work.encode()).hexdigest()[:32]}"
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
                f"there; name the version: {row.name}@{row.version}"
            )
        with self._adapter.transaction():
            spec = self._spec()
            if spec is None or (exact and spec["model"] != row.id):
                spec = {"kind": "score", "model": row.id, "address": f"{row.name}@{row.version}"}
                self._put(spec | {"table": self._table})
            else:
                self.resumed = True
        self._pinned = True
        for live in self._adapter.models(name=row.name):
            if live.id == spec["model"]:
                return self._catalog.of_row(live)
        raise NotFoundError(
            f"the work began with {spec['address']}, which was removed; to go on with another "
            f"version, name it: {row.name}@{row.version}"
        )

    def noted(self, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Change what is noted beside the version, in one transaction, and return it.

        Of a work that leaves no row, and of one that another run has ended, nothing is kept.
        """
        if not self._pinned:
            spec: dict[str, Any] = {}
            change(spec)
            return spec
        with self._adapter.transaction():
            found = self._spec()
            spec = found or {}
            change(spec)
            if found is not None:
                self._put(spec)
        return spec

    def _spec(self) -> dict[str, Any] | None:
        found = next((job[1] for job in self._adapter.jobs() if job[0] == self._id), None)
        return None if found is None else dict(json.loads(found))

    def _put(self, spec: Mapping[str, Any]) -> None:
        self._adapter.put_job(self._id, json.dumps(spec), repr(time.time()), SCORING)

    def end(self) -> None:
        """Forget the version: the work is done."""
        if self._pinned:
            with self._adapter.transaction():
                self._adapter.delete_job(self._id)
