# SPDX-License-Identifier: Apache-2.0
"""Who gives workers their work, and brings back what became of it.

Of a query and of files, the driver does, part by part. A dataset is read by Ray Data, which runs in
an actor of its own: not in the driver, where it does not run when that is connected by Ray Client;
and so what it writes to standard error is in Ray's logs. When that actor is killed, another begins
again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import threading
import warnings
from collections.abc import Generator, Sequence
from typing import Any, Final

from pydedup.errors import ClusterError
from pydedup.ray.cluster import LOST, import_ray, is_lost, kill
from pydedup.ray.score_plan import Settings
from pydedup.ray.score_pool import CLOSE_SECONDS, Pool, cause_of, never_began, words_of
from pydedup.text import plural

__all__ = ["scored"]

#: How often what reads a dataset may die without more done than before.
_MOST_DEATHS: Final = 20
_GAVE_UP: Final = -1


def scored(
    ray: Any,
    dataset: Any,
    settings: Settings,
    missing: Sequence[int],
    workers: int,
    max_deaths: int,
) -> Generator[tuple[int, str] | None, None, None]:
    """Yield what workers say of each part, as they are done with it.

    Of a dataset, parts are blocks; ``None`` means that it is begun again, and all are told anew.
    Raises ClusterError, see `Pool.results`.
    """

    def name(number: int, piece: object) -> str:
        return f"part {number + 1} of {len(settings.parts)}, {settings.parts[number]}"

    try:
        if dataset is not None:
            yield from _of_dataset(ray, dataset, settings, workers, max_deaths)
        else:
            pool = Pool(ray, settings, "part", min(workers, len(missing)), max_deaths, name)
            yield from pool.results((number, number) for number in missing)
    except Exception as error:
        if not is_lost(error):
            raise
        raise ClusterError(f"{LOST}; run it again to continue") from error


def _of_dataset(
    ray: Any, dataset: Any, settings: Settings, workers: int, max_deaths: int
) -> Generator[tuple[int, str] | None, None, None]:
    died = importlib.import_module("ray.exceptions").RayActorError
    deaths = most = 0
    while True:
        blocks = 0
        feeder = ray.remote(num_cpus=0, max_restarts=0, max_concurrency=2)(_Feeder).remote(
            dataset, settings, workers, max_deaths
        )
        try:
            while True:
                told: tuple[int, str] | None = ray.get(feeder.next.remote())
                if told is None:
                    return
                number, result = told
                if number == _GAVE_UP:
                    raise ClusterError(result)
                blocks += 1
                # Blocks that were done before are told anew, and of these no row is written.
                if blocks > most or json.loads(result)["rows"]:
                    deaths, most = 0, max(blocks, most)
                yield number, result
        except died as error:
            if (why := never_began(error)) is not None:
                raise ClusterError(f"the dataset cannot be read: {why}") from None
            deaths += 1
            if deaths >= _MOST_DEATHS:
                raise ClusterError(
                    f"the reader of the dataset died {deaths} times without progress (the last "
                    f"time: {cause_of(error)}); see that it has enough memory, and run it again"
                ) from None
            yield None
        finally:
            _end(ray, feeder)


def _end(ray: Any, feeder: Any) -> None:
    """End what reads a dataset, when its workers have closed what they have open."""
    try:
        with contextlib.suppress(Exception):  # of a cluster that is gone
            feeder.stop.remote()
            ray.wait([feeder.close.remote()], timeout=2 * CLOSE_SECONDS)
    finally:
        kill(ray, feeder)


class _Feeder:
    """The actor in which Ray Data runs, and from which its blocks go to workers."""

    def __init__(self, dataset: Any, settings: Settings, workers: int, max_deaths: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Ray's own code
            ray, data = import_ray(), import_ray("ray.data")
            data.DataContext.get_current().enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            bundles = dataset.iter_internal_ref_bundles()
        blocks = enumerate(block for bundle in bundles for block in bundle.block_refs)
        describe = ray.remote(num_cpus=0, max_retries=0)(described)

        def name(number: int, block: Any) -> str:
            said = f"block {number} of the dataset"
            try:
                return f"{said}, {ray.get(describe.remote(block, settings.key))}"
            except Exception:  # what kills the workers may be the block itself
                return said

        self._pool = Pool(ray, settings, "block", workers, max_deaths, name)
        self._results = self._pool.results(blocks)
        self._at_work = threading.Lock()

    def stop(self) -> None:
        """Have workers end soon, beside `next`."""
        self._pool.stop()

    def close(self) -> None:
        """Return when workers have closed what they had open."""
        with self._at_work:
            self._results.close()

    def next(self) -> tuple[int, str] | None:
        """Return the next result, ``None`` after the last; what went wrong as a text."""
        try:
            with self._at_work:
                return next(self._results, None)
        except ClusterError as error:
            return _GAVE_UP, str(error)
        except Exception as error:
            return _GAVE_UP, f"the dataset cannot be read: {words_of(error)}"


def described(block: Any, key: str) -> str:
    """Return how many rows a block of Ray Data has, and from where to where their keys go."""
    table = import_ray("ray.data.block").BlockAccessor.for_block(block).to_arrow()
    keys = [one for one in table[key].to_pylist() if one is not None]
    span = f" with keys from {min(keys)!r} to {max(keys)!r}" if keys else ""
    return f"{plural(table.num_rows, 'row')}{span}"
