# SPDX-License-Identifier: Apache-2.0
"""What Prometheus is told. Only models that the store has become labels, so a client makes none.

Models come and go while a server runs, so only those that were asked for last keep theirs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "MOST_MODELS", "Metrics", "pool_family"]

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: Models that are told apart at most: 0.6 MB for Prometheus to read.
MOST_MODELS = 10_000
#: What the pool counts up, apart from what it has now.
_COUNTED = ("hits", "misses", "inserts", "evictions", "waits", "wait_us")


class Metrics:
    """The counters of one server."""

    def __init__(
        self,
        pool: Callable[[], Mapping[str, int]] | None,
        gauges: Mapping[str, tuple[str, Callable[[], float]]],
    ) -> None:
        self._registry = CollectorRegistry()
        # By model and outcome, last asked last. A Counter would tell of each when it began, too.
        self._requests: OrderedDict[str, dict[str, int]] = OrderedDict()
        what = "From the first byte of an inference request to the last of its answer."
        self._seconds = _histogram("request_seconds", what, _SECONDS)
        self._batch_requests = _histogram("batch_requests", "Requests that went together.", _SIZES)
        what = "Rows of requests that went together."
        self._batch_rows = _histogram("batch_rows", what, _SIZES)
        self._lock = threading.Lock()
        self._registry.register(_Asked(self._told))
        for name, (text, value) in gauges.items():
            Gauge(f"pydedup_{name}", text, registry=self._registry).set_function(value)
        if pool is not None:
            stats = pool
            self._registry.register(
                _Asked(lambda: [pool_family(name, value=n) for name, n in stats().items()])
            )
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def register(self, collector: Collector) -> None:
        """Have something else counted, too."""
        self._registry.register(collector)

    def request(self, model: str, outcome: str, seconds: float) -> None:
        """Count one inference request."""
        with self._lock:
            self._seconds.observe(seconds)
            counts = self._requests.setdefault(model, {})
            counts[outcome] = counts.get(outcome, 0) + 1
            self._requests.move_to_end(model)
            if len(self._requests) > MOST_MODELS:
                self._requests.popitem(last=False)

    def batch(self, requests: int, rows: int) -> None:
        """Count one batch."""
        with self._lock:
            self._batch_requests.observe(requests)
            self._batch_rows.observe(rows)

    def text(self) -> bytes:
        """Return all of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _told(self) -> Iterator[Metric]:
        """Yield what is counted here, of one moment.

        Counts and sum of a histogram are two numbers to its package.
        """
        with self._lock:
            counts = [(model, *one) for model, of in self._requests.items() for one in of.items()]
            histograms = (self._seconds, self._batch_requests, self._batch_rows)
            found = [metric for one in histograms for metric in one.collect()]
        requests = CounterMetricFamily(
            "pydedup_requests",
            "Inference requests by model and outcome; the model is empty where there is none.",
            labels=["model", "outcome"],
        )
        for model, outcome, count in counts:
            requests.add_metric([model, outcome], count)
        yield requests
        yield from found


def _histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
    """Return a histogram that `Metrics` tells of."""
    return Histogram(f"pydedup_{name}", what, buckets=buckets, registry=None)


class _Asked(Collector):
    """What is asked for its metrics when somebody looks."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def pool_family(name: str, **values: Any) -> CounterMetricFamily | GaugeMetricFamily:
    """Return what is told of one of the numbers of `PagePool.stats`."""
    kind = CounterMetricFamily if name in _COUNTED else GaugeMetricFamily
    return kind(f"pydedup_pool_{name}", f"Buffer pool: {name.replace('_', ' ')}.", **values)
