# SPDX-License-Identifier: Apache-2.0
"""What a server tells Prometheus, read back: for who watches one server without Prometheus."""

from __future__ import annotations

import http.client
import math
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

from prometheus_client.parser import text_string_to_metric_families

from pydedup.errors import ArgumentError, UnavailableError

__all__ = ["Histogram", "Rates", "Scrape", "Source", "parse"]

#: Larger answers are none of our server's.
_LARGEST_BYTES = 16 * 1024 * 1024
_PATIENCE_SECONDS = 5.0
_OTHER_NAME = " Call the server by a name that the certificate has"
#: By OpenSSL's code: one that nobody known has signed, in several ways, and one of another name.
_HOW_TO_TRUST = {
    **dict.fromkeys((18, 19, 20, 21), " (--tls-ca FILE names one to trust)"),
    **dict.fromkeys((62, 64), _OTHER_NAME),
}


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values below bounds.

    Attributes
    ----------
    bounds
        Ascending; the last one is infinite.
    counts
        How many values were at most each bound.
    total
        Their sum.
    """

    bounds: tuple[float, ...] = (math.inf,)
    counts: tuple[float, ...] = (0.0,)
    total: float = 0.0

    @property
    def count(self) -> float:
        """How many values there were."""
        return self.counts[-1]

    @property
    def mean(self) -> float | None:
        """Their mean, if there are any."""
        return self.total / self.count if self.count else None

    def since(self, before: Histogram) -> Histogram:
        """Return what came after an earlier state."""
        if before.bounds != self.bounds:
            return self
        counts = tuple(now - then for now, then in zip(self.counts, before.counts, strict=True))
        return Histogram(self.bounds, counts, self.total - before.total)

    def quantile(self, part: float) -> float | None:
        """Return a quantile, taking values to be even within a bucket, as Prometheus does.

        The largest finite bound where it is beyond that.
        """
        if self.count <= 0:
            return None
        rank, below, low = part * self.count, 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count >= rank and count > below:
                if math.isinf(bound):
                    return low
                return low + (bound - low) * (rank - below) / (count - below)
            below, low = count, bound
        return low


@dataclass(frozen=True, slots=True)
class Scrape:
    """A server at one moment.

    Attributes
    ----------
    at
        When, on a clock that only goes forward.
    models
        Requests by model and outcome; the model is empty where there was none.
    seconds, batch_requests, batch_rows
        Histograms.
    pool
        What the buffer pool counts, by the names of `PagePool.stats`.
    gauges
        All else that has no labels.
    """

    at: float
    models: Mapping[tuple[str, str], float] = field(default_factory=dict)
    seconds: Histogram = Histogram()
    batch_requests: Histogram = Histogram()
    batch_rows: Histogram = Histogram()
    pool: Mapping[str, float] = field(default_factory=dict)
    gauges: Mapping[str, float] = field(default_factory=dict)

    @property
    def under_way(self) -> int:
        """How many requests are being answered, beside the one that asked this."""
        return max(int(self.gauges.get("pydedup_open_requests", 0)) - 1, 0)

    @property
    def started(self) -> float | None:
        """When the process began, in seconds since 1970."""
        return self.gauges.get("process_start_time_seconds")


class Rates:
    """What happened between two scrapes of one server; since its start when it is another one."""

    def __init__(self, before: Scrape | None, now: Scrape) -> None:
        if before is None or before.started != now.started or before.at >= now.at:
            before = Scrape(0.0)
            self.span: float | None = None
        else:
            self.span = now.at - before.at
        self.now = now
        self.seconds = now.seconds.since(before.seconds)
        self.batch_requests = now.batch_requests.since(before.batch_requests)
        self.batch_rows = now.batch_rows.since(before.batch_rows)
        self.pool = {name: value - before.pool.get(name, 0) for name, value in now.pool.items()}
        self.models: dict[str, float] = {}
        self.failed: dict[str, float] = {}
        for (model, outcome), value in now.models.items():
            then = before.models.get((model, outcome), 0)
            more = value - then if value >= then else value  # it was gone, and came back
            failed = 0.0 if outcome == "ok" else more
            self.models[model] = self.models.get(model, 0.0) + more
            self.failed[model] = self.failed.get(model, 0.0) + failed

    def per_second(self, amount: float) -> float | None:
        """Return an amount by time; None when there is no span."""
        return None if self.span is None else amount / self.span

    @property
    def hit_ratio(self) -> float | None:
        """Hits of the pool by uses of pages, if there were any."""
        uses = self.pool.get("hits", 0) + self.pool.get("misses", 0)
        return self.pool.get("hits", 0) / uses if uses else None


class Source:
    """The metrics of one server, over one connection for as long as it lasts.

    Parameters
    ----------
    url
        Of the server, e.g. ``http://127.0.0.1:8000``.
    token
        What it wants to be sent, if anything.
    trust
        Certificate (PEM) to trust, beside those of the system.

    Raises
    ------
    ArgumentError
        For a URL that is none of a server, and a file without a certificate.
    """

    def __init__(self, url: str, token: bytes | None, trust: Path | None = None) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")  # as it is looked up
            http.client.HTTPConnection(host or "localhost")
        except (ValueError, http.client.InvalidURL) as error:
            raise ArgumentError(f"{url!r} is no URL of a server: {error}") from None
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.query:
            raise ArgumentError(f"{url!r} is no URL of a server; write it as http://127.0.0.1:8000")
        self.url = f"{parts.scheme}://{parts.netloc}"
        path = quote(parts.path, safe="/%:@!$&'()*+,;=~")  # what is not encoded yet
        self._path = path.rstrip("/").removesuffix("/metrics") + "/metrics"
        self._headers = {} if token is None else {"Authorization": f"Bearer {token.decode()}"}
        if parts.scheme == "http":
            self._connection = http.client.HTTPConnection(
                host, port or 80, timeout=_PATIENCE_SECONDS
            )
        else:
            context = ssl.create_default_context()
            if trust is not None:
                try:
                    context.load_verify_locations(trust)
                except OSError as error:  # of which that of ssl is one
                    raise ArgumentError(f"no certificate (PEM) in {trust}: {error}") from error
            self._connection = http.client.HTTPSConnection(
                host, port or 443, timeout=_PATIENCE_SECONDS, context=context
            )

    def scrape(self) -> Scrape:
        """Ask the server.

        Raises UnavailableError when there is no answer, or it is that of another kind of server.
        """
        for last in (False, True):
            fresh = self._connection.sock is None
            try:
                self._connection.request("GET", self._path, headers=self._headers)
                answer = self._connection.getresponse()
                body = answer.read(_LARGEST_BYTES)
                break
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise UnavailableError(
                        f"the certificate of {self.url} is not trusted: {error.verify_message}"
                        f"{_HOW_TO_TRUST.get(error.verify_code, '')}"
                    ) from error
                if fresh or last:  # one that was open may have been closed for being idle
                    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                    raise UnavailableError(
                        f"{self.url} does not answer: {reason}; is `pydedup serve` running there?"
                    ) from error
        if answer.status == 401:
            raise UnavailableError(f"{self.url} wants its token, or another one (401)")
        if answer.status != 200:
            raise UnavailableError(f"{self.url}{self._path} answers with status {answer.status}")
        try:
            return parse(body.decode())
        except ValueError as error:
            raise UnavailableError(f"{self.url}{self._path} are no metrics: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def parse(text: str) -> Scrape:
    """Parse what `Metrics.text` writes. Raises ValueError for what is no such text."""
    at = time.monotonic()
    models: dict[tuple[str, str], float] = {}
    pool: dict[str, float] = {}
    gauges: dict[str, float] = {}
    histograms: dict[str, Histogram] = {}
    for family in text_string_to_metric_families(text):
        if family.type == "histogram":
            histograms[family.name] = _histogram(family.samples)
            continue
        for sample in family.samples:
            if sample.name == "pydedup_requests_total":
                key = (sample.labels.get("model", ""), sample.labels.get("outcome", ""))
                models[key] = sample.value
            elif sample.name.endswith("_created"):
                continue
            elif sample.name.startswith("pydedup_pool_"):  # on Ray, of several replicas
                name = sample.name.removeprefix("pydedup_pool_").removesuffix("_total")
                pool[name] = pool.get(name, 0) + sample.value
            elif not sample.labels:
                gauges[sample.name] = sample.value
    if not pool:
        raise ValueError("nothing of `pydedup serve` is in it")
    nothing = Histogram()
    return Scrape(
        at,
        models,
        histograms.get("pydedup_request_seconds", nothing),
        histograms.get("pydedup_batch_requests", nothing),
        histograms.get("pydedup_batch_rows", nothing),
        pool,
        gauges,
    )


def _histogram(samples: Sequence[object]) -> Histogram:
    found: list[tuple[float, float]] = []
    total = 0.0
    for sample in samples:
        name, labels, value = sample.name, sample.labels, sample.value  # type: ignore[attr-defined]
        if name.endswith("_bucket"):
            found.append((float(labels["le"]), value))
        elif name.endswith("_sum"):
            total = value
    found.sort()
    if not found:
        return Histogram()
    return Histogram(tuple(a for a, _ in found), tuple(b for _, b in found), total)
