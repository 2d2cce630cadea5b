# SPDX-License-Identifier: Apache-2.0
"""Scoring on Ray: the rows of a query, of Parquet files or of a dataset, predicted by many workers.

Here is what the driver does: cut the work into parts, see that workers can do it, have actors
(`pydedup.ray.score_worker`) do the parts, and note which are done.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydedup import config, errors
from pydedup.arguments import as_count
from pydedup.errors import ArgumentError, ClusterError, PydedupError
from pydedup.ray.cluster import attached, import_ray, on_each_node
from pydedup.ray.score_feed import scored
from pydedup.ray.score_job import MOST_ROWS, Job
from pydedup.ray.score_plan import FilePart, FolderNotes, PartResult, Settings
from pydedup.ray.score_worker import Scorer, hindrance
from pydedup.registry import absolute
from pydedup.serving.score import MOST_FAILURES
from pydedup.types import Progress, ScoreReport, check_progress
from pydedup.words import OnError, check_word

__all__ = ["score"]


def score(
    dataset: Any,
    store_url: str | os.PathLike[str],
    model: str,
    *,
    into: str | os.PathLike[str],
    key: str | None = None,
    columns: Sequence[str] | None = None,
    on: str | None = None,
    workers: int | None = None,
    cpus_per_worker: int = 1,
    batch: int = 1024,
    part_rows: int | None = None,
    memory: str | int = "512MiB",
    max_deaths: int = 4,
    source: str | os.PathLike[str] | None = None,
    on_error: OnError = "fail",
    progress: Progress | None = None,
) -> ScoreReport:
    """Predict each row of a dataset with a stored model, on the workers of a Ray cluster.

    Run again after whatever ended it, it goes on: parts that are done are left out, and in a table
    rows whose key is there are. The version stays the one that the address meant at first.
    docs/ray.md says the rest.

    Parameters
    ----------
    dataset
        A text: one SELECT, a key and the features, as `Store.score` takes it. A path (`pathlib`),
        or a list of paths: Parquet files, or folders of them. Or a ``ray.data.Dataset``.
    store_url
        The store, as workers reach it.
    into
        A text: a table of the database, created when it is missing. A path (`pathlib`): a folder,
        in which there will be a Parquet file for each part; all machines must share it.
    key, columns
        The column that is the key, the first by default; the columns to read of Parquet or of a
        dataset, all by default.
    on
        Where the cluster is, see `pydedup.ray.attached`.
    workers
        How many work, each with a buffer pool of its own; by default as many as the cluster has
        CPUs for.
    cpus_per_worker
        CPUs that Ray keeps for each, and threads of its kernels.
    batch, part_rows
        Rows predicted and written at a time; rows of a part, at most (65,536 by default).
    memory
        Budget of each worker, as of `pydedup.open`.
    max_deaths
        Of workers that died while they were at one and the same part, until that is left. All other
        parts are done before the work ends with an error that names those that are left.
    source
        URL of the database to read and write, when it is not that of the store.
    on_error
        What a row does that cannot be predicted: ``"fail"`` ends the work, ``"skip"`` leaves
        it out.
    progress
        Called with ``"scoring"``, rows done, and all rows where that is known (otherwise 0).

    Raises
    ------
    ArgumentError, NotFoundError, ReadOnlyError, ConflictError, UnavailableError, ClusterError
    """
    begun = time.monotonic()
    import_ray()
    cpus_per_worker = _count("cpus_per_worker", cpus_per_worker)
    batch, max_deaths = _count("batch", batch), _count("max_deaths", max_deaths)
    workers = None if workers is None else _count("workers", workers)
    part_rows = MOST_ROWS if part_rows is None else _count("part_rows", part_rows)
    check_word("on_error", on_error, get_args(OnError))
    if columns is not None:
        columns = _names(columns)
    check_progress(progress)
    config.parse_memory(memory)
    store_url = absolute(store_url)
    source = None if source is None else absolute(source)
    job = Job(dataset, store_url, source, model, into)
    cpus = None if workers is None else workers * cpus_per_worker
    with contextlib.ExitStack() as left:
        left.enter_context(job.opened())
        try:
            settings = job.settled(
                key, columns, batch=batch, memory=memory, threads=cpus_per_worker, on_error=on_error
            )
            ray = left.enter_context(attached(on, cpus=cpus))
            count = _workers(ray, workers, cpus_per_worker, reads=job.dataset is not None)
            on_each_node(ray, hindrance, settings, _version())
            settings = job.cut(settings, part_rows, count)
        except BaseException:
            job.take_back()
            raise
        try:
            return _run(ray, job, settings, count, max_deaths, progress, begun)
        except ClusterError:  # workers may be at work yet
            raise
        except PydedupError:
            job.take_back_unwritten()
            raise


def _count(name: str, value: int) -> int:
    return as_count(name, value, least=1, most=1 << 20)


def _names(columns: Any) -> list[str]:
    names = [] if isinstance(columns, str) or not isinstance(columns, Iterable) else list(columns)
    if not names or not all(isinstance(name, str) for name in names):
        raise ArgumentError(f"columns is {columns!r}; give a list of names, such as ['id', 'age']")
    return names


def _workers(ray: Any, wanted: int | None, cpus: int, *, reads: bool) -> int:
    """Return how many workers there can be. Raises ArgumentError when fewer than wanted.

    Beside them, a dataset takes a CPU that ``reads`` it.
    """
    free = int(ray.cluster_resources().get("CPU", 0)) - (1 if reads else 0)
    there = max(free, 0) // cpus
    if there < (wanted or 1):
        raise ArgumentError(
            f"the Ray cluster has CPUs for {there} workers of {cpus}"
            f"{' beside one that reads the dataset' if reads else ''}, and {wanted or 1} are "
            "asked for; take fewer (workers, cpus_per_worker; --workers, --cpus-per-worker)"
        )
    return wanted or there


def _run(
    ray: Any,
    job: Job,
    settings: Settings,
    workers: int,
    max_deaths: int,
    progress: Progress | None,
    begun: float,
) -> ScoreReport:
    """Have workers do what is not done yet."""
    assert job.notes is not None
    done = {} if job.dataset is not None else job.done(settings)
    total = _Total()
    for result in done.values():
        total.skipped += result.rows + result.skipped
        total.failed += result.failed
        total.failures += result.failures
    everything = sum(p.stop - p.start for p in settings.parts if isinstance(p, FilePart))
    missing = [number for number in range(len(settings.parts)) if number not in done]
    if missing or job.dataset is not None:
        results = scored(ray, job.dataset, settings, missing, workers, max_deaths)
        with contextlib.closing(results):  # at once: an error would keep workers at work
            for told in results:
                if told is None:
                    total = _Total()
                    continue
                number, result = told[0], _result_of(told[1])
                total.add(result)
                if job.dataset is None and job.folder is None:
                    job.notes.mark(number, result)
                if progress is not None:
                    progress("scoring", total.seen, everything)
    _end(job, settings, total)
    return ScoreReport(
        model=settings.address,
        table=job.table,
        rows=total.rows,
        skipped=total.skipped,
        failed=total.failed,
        failures=tuple(total.failures[:MOST_FAILURES]),
        resumed=job.resumed,
        seconds=time.monotonic() - begun,
    )


def _end(job: Job, settings: Settings, total: _Total) -> None:
    if isinstance(job.notes, FolderNotes):
        job.notes.end()
        return
    if not total.rows + total.skipped:
        with contextlib.closing(Scorer(settings)) as scorer:
            work = job.scoring(scorer)
            if job.dataset is not None and not work.target.is_there:
                raise ArgumentError(
                    f"no row of the dataset was predicted, and so table {job.table} was not "
                    "created: without one, the type of its key is not known"
                )
            work.end()
    if job.pin is not None:
        job.pin.end()


class _Total(PartResult):
    """What all parts did together."""

    def add(self, result: PartResult) -> None:
        """Add what one did."""
        self.rows += result.rows
        self.skipped += result.skipped
        self.failed += result.failed
        self.failures += result.failures

    @property
    def seen(self) -> int:
        """Rows that are done with."""
        return self.rows + self.skipped + self.failed


def _version() -> str:
    import pydedup

    return pydedup.__version__


def _result_of(told: str) -> PartResult:
    """Return what a worker said of a part, or raise what it met."""
    noted = json.loads(told)
    if "error" in noted:
        name, said = noted["error"]
        kind = getattr(errors, name, None) if name else None
        if isinstance(kind, type) and issubclass(kind, PydedupError):
            raise kind(said)
        raise ClusterError(f"a Ray worker failed: {said}")
    return PartResult.of(noted)
