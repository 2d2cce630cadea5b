# SPDX-License-Identifier: Apache-2.0
"""Requests over a fleet of models, as traces that the store's own replacement policies replay.

Pages are sampled in space, as in SHARDS (Waldspurger, Park, Garthwaite, Ahmad, FAST 2015): a page
belongs to the sample when a hash of its id is below a threshold, so all uses of a page are in the
trace or none; the pool shrinks by the same factor. What the sample misses, divided by the factor,
estimates what all pages would miss; hits are the rest of the uses that there really are, which is
the correction that the paper calls SHARDS-adj: whether one of the few hot pages fell into the
sample then matters little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pydedup.replacement import Trace, replay

__all__ = ["Fleet", "Served", "Touches", "draw_requests", "fleet_trace", "serve", "zipf"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

#: Own pages of a model are numbered from here, so many at most.
_OWN, _OWN_BITS = 1 << 44, 16
_MAX_POOL_PAGES = 4096


@dataclass(frozen=True, slots=True)
class Touches:
    """How likely a request uses each page, first to last; 1 for dense models.

    ``base`` are pages of the family's first model, ``own`` those that a further model brought.
    """

    base: tuple[float, ...] = (1.0,)
    own: tuple[float, ...] = (1.0,)

    @staticmethod
    def at(profile: Sequence[float], place: Ints, count: Ints) -> Floats:
        """Return the probability of page ``place`` of ``count``."""
        steps = np.asarray(profile)
        index = np.minimum(place * len(steps) // np.maximum(count, 1), len(steps) - 1)
        found: Floats = steps[index]
        return found


@dataclass(frozen=True, slots=True)
class Fleet:
    """Models, grouped into families, with what each reads.

    Attributes
    ----------
    family
        The family of each model, int64 (models,); models of a family follow one another.
    base_pages, own_pages
        Pages of the family's first model, int64 (families,); pages that a further model of it
        brought, int64 (families,).
    base_bytes, own_bytes
        Bytes of one of those pages.
    touches
        Of each family, an index into ``profiles``.
    """

    family: Ints
    base_pages: Ints
    own_pages: Ints
    base_bytes: Ints
    own_bytes: Ints
    touches: Ints
    profiles: tuple[Touches, ...] = (Touches(),)
    first: Ints = field(init=False)

    def __post_init__(self) -> None:
        _, first = np.unique(self.family, return_index=True)
        object.__setattr__(self, "first", first.astype(np.int64))

    @property
    def models(self) -> int:
        return len(self.family)


def zipf(count: int, exponent: float) -> Floats:
    """Return chances by rank."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def draw_requests(chances: Floats, count: int, rng: np.random.Generator) -> Ints:
    """Return the models of so many requests."""
    edges = np.cumsum(chances)
    found = np.searchsorted(edges, rng.random(count) * edges[-1], side="right")
    return np.minimum(found, len(chances) - 1).astype(np.int64)


def _sampled(ids: Ints, rate: float) -> NDArray[np.bool_]:
    """Say which pages belong to a sample; SplitMix64 of the id, upper bits."""
    z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) < rate * 2.0**53


def fleet_trace(
    fleet: Fleet, models: Ints, rate: float, rng: np.random.Generator
) -> tuple[Trace, float]:
    """Return the sampled trace of some requests, and how many uses the whole one has (expected).

    A request of a model uses base pages of its family, then its own; of the first model of a
    family, its own are the base pages. Each page at most once a request.
    """
    distinct, which = np.unique(models, return_inverse=True)
    families = fleet.family[distinct]
    is_first = fleet.first[families] == distinct
    base = fleet.base_pages[families]
    own = np.where(is_first, 0, fleet.own_pages[families])
    ids, sizes, chances, starts, expected = [], [], [], [0], np.zeros(len(distinct))
    for number in range(len(distinct)):
        profile = fleet.profiles[int(fleet.touches[families[number]])]
        n_base, n_own = int(base[number]), int(own[number])
        place_base, place_own = np.arange(n_base), np.arange(n_own)
        chance = np.concatenate(
            [
                Touches.at(profile.base, place_base, np.int64(n_base)),
                Touches.at(profile.own, place_own, np.int64(n_own)),
            ]
        )
        expected[number] = chance.sum()
        page = np.concatenate(
            [
                (families[number] << _OWN_BITS) + place_base,
                _OWN + (distinct[number] << _OWN_BITS) + place_own,
            ]
        )
        size = np.concatenate(
            [
                np.full(n_base, fleet.base_bytes[families[number]]),
                np.full(n_own, fleet.own_bytes[families[number]]),
            ]
        )
        chosen = np.flatnonzero(_sampled(page, rate)) if rate < 1 else slice(None)
        ids.append(page[chosen])
        sizes.append(size[chosen])
        chances.append(chance[chosen])
        starts.append(starts[-1] + len(ids[-1]))
    all_ids, all_sizes, all_chances = map(np.concatenate, (ids, sizes, chances))
    start = np.array(starts, np.int64)
    lengths = np.diff(start)[which]
    call = np.repeat(np.arange(1, len(models) + 1), lengths)
    offset = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.repeat(start[:-1][which], lengths) + offset
    used = rng.random(len(at)) < all_chances[at]
    at, call = at[used], call[used]
    trace = Trace(
        all_ids[at], all_sizes[at].astype(np.uint32), call.astype(np.uint32), models.copy()
    )
    return trace, float(expected[which].sum())


@dataclass(frozen=True, slots=True)
class Served:
    """What the second half of some requests came to, the first half having filled the pool.

    Attributes
    ----------
    uses, reads, read_bytes
        Distinct pages that a request uses, pages that it has to read, and their bytes.
    waiting
        Share of the requests that have to read at all. Of a sample of the pages this is too high
        where some requests read several and others none, and never above what ``reads`` allows.
    rate
        Share of pages that were replayed.
    resident
        Pages that the whole pool holds.
    """

    uses: float
    reads: float
    read_bytes: float
    waiting: float
    rate: float
    resident: float

    @property
    def hit_ratio(self) -> float:
        return 1.0 - self.reads / self.uses if self.uses else 0.0


def serve(
    fleet: Fleet,
    models: Ints,
    memory: int,
    *,
    policy: str = "reuse",
    rate: float | None = None,
    pool_pages: int = 512,
    seed: int = 0,
    warm: float = 0.5,
) -> Served:
    """Replay requests of these models through a pool of so many bytes.

    ``rate`` is the share of pages to replay; by default what makes the pool hold ``pool_pages``,
    since finding a victim takes time in proportion.
    """
    mean_page = float(np.average(fleet.base_bytes, weights=np.maximum(fleet.base_pages, 1)))
    if rate is None:
        rate = min(1.0, pool_pages * mean_page / memory)
    rng = np.random.default_rng(seed)
    trace, expected = fleet_trace(fleet, models, rate, rng)
    if not len(trace):
        raise SystemExit(f"a sample of {rate:.2g} of the pages has none; ask for more requests")
    budget = max(int(memory * rate), int(trace.nbytes.max()))
    split = int(len(models) * warm)
    cut = int(np.searchsorted(trace.calls, split, side="right"))
    head = Trace(trace.pages[:cut], trace.nbytes[:cut], trace.calls[:cut], trace.owners)
    before, whole = replay(head, budget, policy), replay(trace, budget, policy)
    count = (len(models) - split) * rate
    return Served(
        uses=expected / len(models),
        reads=(whole.misses - before.misses) / count,
        read_bytes=(whole.missed_bytes - before.missed_bytes) / count,
        waiting=min((whole.missed_calls - before.missed_calls) / count, 1.0),
        rate=rate,
        resident=min(memory / mean_page, float(len(np.unique(trace.pages))) / rate),
    )
