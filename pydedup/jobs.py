# SPDX-License-Identifier: Apache-2.0
"""Which running work a staging belongs to, and whether it is still alive.

A writer leaves a job row and refreshes its cursor, a time stamp, with every transaction. A job is
dead when it was silent for `LEASE_SECONDS`, or at once when its process is known to be gone: the
row also names the machine (boot id), the process namespace, the process and its start time. Where
that is this machine, its clock that nobody sets says for how long, and not the time of day.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager
from pathlib import Path

from pydedup.adapter import LIVE, STAGING, Adapter
from pydedup.adapter_options import (
    ExpectingAdapter,
    NumberingAdapter,
    StagingAdapter,
    only_sound_rows,
)
from pydedup.errors import CorruptStoreError
from pydedup.sets import in_parts
from pydedup.types import LARGEST_ID

__all__ = [
    "LEASE_SECONDS",
    "NO_SIGN",
    "PAGES_PER_TRANSACTION",
    "SCORING",
    "Job",
    "job_is_dead",
    "job_is_ours",
    "models_of_job",
    "staging_jobs",
]

#: State of the row of a scoring, which outlives its process: the next run goes on with it.
SCORING = "scoring"

#: A job that gave no sign of life for this long is abandoned.
LEASE_SECONDS = 600.0

#: What is said of one that a vacuum took for that, and that goes on.
NO_SIGN = (
    f"gave no sign of life for {LEASE_SECONDS:.0f} s (it was stopped, or its machine is not that "
    "of the vacuum and slept or has another time: set its clock)"
)

#: No clock of another machine is so far ahead of ours; a time stamp that is was damaged.
_MOST_AHEAD_SECONDS = 7 * 86400.0

#: Pages that are staged, or deleted, in one transaction.
PAGES_PER_TRANSACTION = 16
_BEAT_SECONDS = 60.0
# Bytes of staged pages after which they are settled: here, and by somebody beside. What comes
# meanwhile he cannot finish, and so the log grows; up to this many it may.
_SETTLE_BYTES, _BESIDE_BYTES, _MOST_UNSETTLED_BYTES = 64 << 20, 8 << 20, 256 << 20


class Job:
    """Staging work of this process: its sign of life, and the pages that it writes unseen.

    What `StagingAdapter.settle` does, ``beside`` does meanwhile, if that is given.
    """

    def __init__(self, adapter: Adapter, kind: str, beside: Executor | None = None) -> None:
        self._adapter = adapter
        self._kind = kind
        import uuid  # of no use to who only reads

        self._id = uuid.uuid4().hex
        self._beaten = time.monotonic()
        #: The models that it is staging.
        self.model_ids: Sequence[int] = ()
        self._beside = beside
        # Bytes that were staged since all was settled, and those that somebody beside began with.
        self._unsettled = self._begun = 0
        self._settling: Future[None] | None = None

    def beat(self) -> None:
        """Say that this process is at it; inside a transaction."""
        process = _identity(os.getpid())
        job = {"kind": self._kind, "models": list(self.model_ids), "process": process}
        spec = json.dumps({**job, "clock": time.monotonic()})
        self._adapter.put_job(self._id, spec, repr(time.time()), "running")
        self._beaten = time.monotonic()

    @contextlib.contextmanager
    def staging(self) -> Iterator[None]:
        """Transaction that stages: durable when what it wrote is published, if not at once."""
        adapter = self._adapter
        if not isinstance(adapter, StagingAdapter):
            with adapter.transaction():
                yield
            return
        with adapter.staging():
            yield
        self._settle(adapter)

    def expect(self, nbytes: int) -> None:
        """Tell the database how many bytes of pages will be staged; outside of transactions."""
        if isinstance(self._adapter, ExpectingAdapter):
            self._adapter.expect(nbytes)

    def publishing(self) -> AbstractContextManager[None]:
        """Transaction that makes durable what was staged."""
        if isinstance(self._adapter, StagingAdapter):
            return self._adapter.publishing()
        return self._adapter.transaction()

    def finish(self) -> None:
        """Leave nothing to be done for the database, once what was staged is published."""
        self._end_settling()
        self._adapter.checkpoint()

    def _settle(self, adapter: StagingAdapter) -> None:
        """Have settled what was staged: beside, or here when that does not keep up."""
        if self._unsettled >= (_SETTLE_BYTES if self._beside is None else _MOST_UNSETTLED_BYTES):
            self._end_settling()
            adapter.settle()
            self._unsettled = self._begun = 0
            return
        is_free = self._settling is None or self._settling.done()
        if self._beside is not None and is_free and self._unsettled - self._begun >= _BESIDE_BYTES:
            self._begun = self._unsettled
            self._settling = self._beside.submit(adapter.settle)

    def _end_settling(self) -> None:
        if self._settling is not None:
            wait([self._settling])

    def keep_alive(self) -> None:
        """Beat once a minute, in a transaction of its own: for where nothing is written for long.

        Cheap enough for every turn of a loop.
        """
        if time.monotonic() - self._beaten > _BEAT_SECONDS:
            with self.staging():
                self.beat()

    def connect(self) -> None:
        """See to it that this thread has a connection. Raises UnavailableError."""
        self._adapter.epoch()

    def new_page_ids(self, count: int) -> list[int] | None:
        """Return ids for `stage_numbered_pages`; ``None`` where the database gives them itself."""
        adapter = self._adapter
        return adapter.new_page_ids(count) if isinstance(adapter, NumberingAdapter) else None

    def stage_pages(self, pages: Sequence[tuple[bytes, bytes]]) -> list[int]:
        """Insert (checksum, payload) of pages, inside a transaction; return their ids, in order.

        Their blocks follow (`stage_blocks`).
        """
        page_ids = self._adapter.insert_pages(pages, state=STAGING)
        self._unsettled += sum(len(payload) for _, payload in pages)
        return [self.checked_id("pages", page_id) for page_id in page_ids]

    def checked_id(self, table: str, row_id: int) -> int:
        """Return the id of a new row. Raises CorruptStoreError where it follows a damaged one."""
        if row_id > LARGEST_ID:
            raise CorruptStoreError(
                f"{self._adapter.url} gives a new row of {table} the id {row_id}, beyond all that "
                "a store has: another row has a damaged one; restore a backup"
            )
        return row_id

    def stage_numbered_pages(
        self, pages: Sequence[tuple[bytes, bytes]], ids: Sequence[int]
    ) -> None:
        """Insert (checksum, payload) with ids of `new_page_ids`; inside a transaction."""
        adapter = self._adapter
        assert isinstance(adapter, NumberingAdapter)
        adapter.insert_pages(pages, state=STAGING, ids=ids)

    def stage_blocks(self, rows: Iterable[tuple[bytes, int, int, int | None]]) -> None:
        """Insert (hash128, page_id, slot, base_id) of distinct blocks; inside a transaction.

        The more at a time the better: hashes lie anywhere in their index, so that a transaction
        changes about as much of it for a thousand rows as for fifty thousand. In their order each
        part of it is changed once.
        """
        self._adapter.insert_blocks(sorted(rows))

    def end(self) -> None:
        """Take the job back; inside a transaction."""
        self._adapter.delete_job(self._id)

    def discard(self, page_ids: Sequence[int]) -> None:
        """Delete staged pages and end, in bounded transactions.

        A page that is live stays: an interrupt, or a connection that broke, can hide a commit
        from whoever made it.
        """
        for group in in_parts(page_ids, PAGES_PER_TRANSACTION):
            with self._adapter.transaction():
                live = {row.id for row in self._adapter.page_rows(ids=group, state=LIVE)}
                # Of one whose row is gone, what is recorded of its blocks is still there.
                self._adapter.delete_pages([page_id for page_id in group if page_id not in live])
        with self._adapter.transaction():
            self.end()


def staging_jobs(adapter: Adapter) -> list[tuple[str, str, str, str]]:
    """Return the rows of jobs that stage something, dead or alive, and those that are damaged.

    Of these only the id is left, and nobody can go on with one, whatever it was.
    """
    damaged: list[tuple[str, str, str, str]] = []

    def tell(table: str, key: Mapping[str, object], said: str) -> None:
        job_id = key.get("id")
        if isinstance(job_id, str):
            damaged.append((job_id, "", "", ""))

    with only_sound_rows(adapter, tell):
        return [job for job in adapter.jobs() if job[3] != SCORING] + damaged


def models_of_job(spec: str) -> list[int]:
    """Return the ids of the models that a job stages."""
    return [int(model_id) for model_id in json.loads(spec).get("models", ())]


def job_is_dead(spec: str, cursor: str, lease_seconds: float = LEASE_SECONDS) -> bool:
    """Return whether whoever left this job cannot be working on it any more.

    A job that cannot be read counts as dead.
    """
    try:
        models_of_job(spec)
        noted = json.loads(spec)
        silent = time.time() - float(cursor)
        process, here = noted.get("process"), _identity(os.getpid())
        if process and here and all(process[key] == here[key] for key in ("boot", "namespace")):
            if _identity(int(process["pid"])) != process:
                return True
            if "clock" in noted:  # not where an older pydedup works
                silent = time.monotonic() - float(noted["clock"])
        return not -_MOST_AHEAD_SECONDS <= silent <= lease_seconds
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return True


def job_is_ours(spec: str) -> bool:
    """Return whether this process left a job that can be read."""
    process = json.loads(spec).get("process")
    return bool(process) and process == _identity(os.getpid())


def _identity(pid: int) -> dict[str, str | int] | None:
    """Return what tells one process from all others, ``None`` where /proc does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        # From field 3 on, counted after the command, which may hold spaces and parentheses.
        fields = stat[stat.rindex(")") + 2 :].split()
        if fields[0] == "Z":
            return None  # killed, not yet waited for
        return {
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "namespace": str(Path("/proc/self/ns/pid").readlink()),
            "pid": pid,
            "started": fields[19],
        }
    except (OSError, ValueError, IndexError):
        return None
