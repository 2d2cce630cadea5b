# SPDX-License-Identifier: Apache-2.0
"""Ray Data at work: parts given to a pool of actors, and what became of each brought back.

Ray Data runs inside of the cluster, in an actor of its own, since it does not run in a process that
is connected by Ray Client; and so what it writes to standard error is in Ray's logs. When that
actor is killed, and its pool with it, another takes over with the parts that are missing.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final

from pydedup.errors import ClusterError
from pydedup.ray.cluster import import_ray
from pydedup.ray.score_plan import Settings
from pydedup.ray.score_worker import PartScorer, TableScorer
from pydedup.text import without_secrets

__all__ = ["scored"]

#: How often in a row what feeds the workers may die without a part done.
_MOST_DEATHS: Final = 20
#: Batches of a dataset that a worker is given at a time, and cuts itself.
_BATCHES: Final = 16


def scored(
    ray: Any, dataset: Any, settings: Settings, missing: Sequence[int], workers: int
) -> Iterator[tuple[int, str] | None]:
    """Yield what workers say of each part, as they are done with it.

    Of a dataset, parts are batches; ``None`` means that it is begun again, and all are told anew.
    """
    died = importlib.import_module("ray.exceptions").RayActorError
    waiting, deaths = dict.fromkeys(missing), 0
    while waiting or dataset is not None:
        feeder = ray.remote(num_cpus=0, max_restarts=0)(_Feeder).remote(
            dataset, settings, list(waiting), workers
        )
        try:
            while True:
                told: list[Any] | None = ray.get(feeder.next.remote())
                if told is None:
                    return
                number, result = told
                if number == _GAVE_UP:
                    raise ClusterError(f"Ray gave up: {result}; run it again to go on")
                deaths = 0
                waiting.pop(number, None)
                yield number, result
        except died as error:
            deaths += 1
            if deaths > _MOST_DEATHS:
                raise ClusterError(
                    f"Ray's workers died {deaths} times without a part done ("
                    f"{without_secrets(str(error)).strip().splitlines()[0]}); see that there is "
                    "memory for them, and run it again to go on"
                ) from error
            if dataset is not None:
                yield None
        finally:
            with contextlib.suppress(Exception):
                ray.kill(feeder)


_GAVE_UP: Final = -1


class _Feeder:
    """The actor in which Ray Data runs."""

    def __init__(
        self, dataset: Any, settings: Settings, missing: Sequence[int], workers: int
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Ray's own code
            self._rows = self._iterate(dataset, settings, missing, workers)

    def _iterate(
        self, dataset: Any, settings: Settings, missing: Sequence[int], workers: int
    ) -> Iterator[Any]:
        data = import_ray("ray.data")
        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        count = workers if dataset is not None else min(workers, len(missing))
        options: dict[str, Any] = {
            "compute": data.ActorPoolStrategy(size=count),
            "fn_constructor_args": (settings,),
            # Ray Data starts another in the place of a worker that dies, and gives it its parts.
            "num_cpus": settings.threads,
        }
        if dataset is not None:
            results = dataset.map_batches(
                TableScorer, batch_size=settings.batch * _BATCHES, batch_format="pyarrow", **options
            )
        else:
            items = [{"number": number} for number in missing]
            parts = data.from_items(items, override_num_blocks=len(items))
            results = parts.map_batches(PartScorer, batch_size=1, **options)
        rows: Iterator[Any] = iter(results.iter_rows())
        return rows

    def next(self) -> tuple[int, str] | None:
        """Return the next result, ``None`` after the last; what Ray itself met as a text."""
        try:
            row = next(self._rows, None)
        except Exception as error:
            said = without_secrets(str(error)).strip().splitlines()
            return _GAVE_UP, said[-1] if said else type(error).__name__
        return None if row is None else (int(row["number"]), str(row["result"]))
