# SPDX-License-Identifier: Apache-2.0
"""Whether a drop is small beyond luck: bounds on a mean from few rows, and who judges what.

The setting. A model is scored on n validation rows before and after blocks were replaced; the drop
of row i is d_i = before_i - after_i. Rows are independent draws, so the mean of d over these n is
only an estimate of the drop on all the data there is, and a search that tries many states and
keeps what looks best would find the state that is lucky on these rows.

*Many looks* are dealt with by learning first and testing afterwards, on other rows (Angelopoulos,
Bates, Candes, Jordan, Lei, *Learn then Test*, 2021). A fifth of the rows, drawn by the seed,
*steers*: it alone decides which states are tried and in which order they would be accepted. The
others *judge* each state that steering accepts, in that order, each at the full level, and the
first one that they refuse ends the search for good. This is the fixed-sequence test (Maurer,
Hothorn, Lehmacher, 1995): the order does not depend on the judging rows, so the first truly bad
state on it is accepted with probability at most 1 - confidence, and after it nothing matters.
Hence P(stored model drops by more than the limit) <= 1 - confidence, however many states were
tried, and without a price for how many.

*One look* is a test by betting (Waudby-Smith and Ramdas, *Estimating means of bounded random
variables by betting*, 2024). If the true mean of d were m or more, a gambler who starts with 1 and
multiplies it by 1 + b * (m - d_i) for each row has at most 1 on average, whatever b in
[0, 1 / (span - m)], so by Markov's inequality he reaches 1 / (1 - confidence) with probability at
most 1 - confidence. When he does, m is refuted. It holds for any n, no normal approximation is
made, only d_i <= span is used, and unlike Hoeffding's it feels that most d_i are 0. The bet: half
the money on the b that would have won most on rows like the steering ones, four tenths on the
largest b (which wins most when no row got worse), the rest spread over halved ones.

Not here: calling the user's metric, or the search itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bets", "rows_needed", "split_rows"]

# Distinct drops, and how many rows have each; float64.
_Counted: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]

#: Nobody has so many.
_MOST_ROWS = 1 << 62
#: One row in so many steers.
_STEERING = 5
_HALVINGS = 8
#: Bets as shares of the largest one that cannot lose more than everything.
_SHARES = np.geomspace(2.0**-10, 1.0, 61)
#: Weight of one imagined row that got as much worse as a row can: a bet chosen on steering rows
#: that all stayed as they were would otherwise stake everything.
_IMAGINED = 0.5


@dataclass(frozen=True, slots=True)
class Bets:
    """Stakes (shares of the largest bet) and the money on each, which adds up to 1.

    Attributes
    ----------
    span
        The largest drop that a row can have.
    shares, weights
        float64, of one length.
    """

    span: float
    shares: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, steering: NDArray[np.float64], judging: int, limit: float, span: float) -> Bets:
        """Return the bets that the steering rows' drops suggest against a mean of ``limit``.

        ``judging`` is the number of rows that will be bet on.
        """
        return cls._of(_counted(steering), judging, limit, span)

    @classmethod
    def _of(cls, steering: _Counted, judging: int, limit: float, span: float) -> Bets:
        # A limit of the whole span holds anyway, and would divide by nothing.
        limit = min(limit, 0.999 * span)
        growth = _log_growth(steering, limit, span, _SHARES) * (judging / steering[1].sum())
        with np.errstate(divide="ignore"):
            growth = growth + _IMAGINED * np.log1p(-_SHARES)
        best = _SHARES[int(np.argmax(growth))]
        halved = 0.5 ** np.arange(1, _HALVINGS + 1)
        return cls(
            span,
            np.concatenate([[best, 1.0], halved]),
            np.array([0.5, 0.4] + [0.1 / _HALVINGS] * _HALVINGS),
        )

    def refutes(self, drops: NDArray[np.float64], limit: float, confidence: float) -> bool:
        """Whether a mean drop of more than ``limit`` is refuted at this confidence."""
        return self.log_capital(drops, limit) >= -math.log(1.0 - confidence)

    def upper_bound(self, drops: NDArray[np.float64], confidence: float) -> float:
        """Return the smallest mean drop that is refuted; ``span`` where none is."""
        # The capital grows with the mean that is bet against: (m - d) / (span - m) does.
        low, high = -self.span, self.span
        for _ in range(60):
            middle = (low + high) / 2
            if self.refutes(drops, middle, confidence):
                high = middle
            else:
                low = middle
        return high

    def log_capital(self, drops: NDArray[np.float64], limit: float) -> float:
        """Return the log of what 1 has become after betting on all rows against ``limit``."""
        return self._log_capital(_counted(drops), limit)

    def _log_capital(self, drops: _Counted, limit: float) -> float:
        if limit >= self.span:
            return math.inf
        growth = _log_growth(drops, limit, self.span, self.shares) + np.log(self.weights)
        most = float(growth.max())
        return most + math.log(float(np.exp(growth - most).sum()))


def split_rows(n_rows: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (steering, judging) rows: a fifth, at least one, drawn by the seed; the others."""
    order = np.random.default_rng(seed).permutation(n_rows)
    cut = max(1, n_rows // _STEERING)
    return np.sort(order[:cut]), np.sort(order[cut:])


def rows_needed(limit: float, span: float, confidence: float) -> int:
    """Return how many rows it takes at the least: fewer cannot show it, even if none got worse.

    2**62 stands for all that is more.
    """

    def enough(n_rows: int) -> bool:
        steering = max(1, n_rows // _STEERING)
        judging = n_rows - steering
        bets = Bets._of(_unchanged(steering), judging, limit, span)
        return bets._log_capital(_unchanged(judging), limit) >= -math.log(1.0 - confidence)

    high = 2
    while high < _MOST_ROWS and not enough(high):
        high *= 2
    if high == _MOST_ROWS:
        return high
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _counted(drops: NDArray[np.float64]) -> _Counted:
    values, counts = np.unique(drops, return_counts=True)
    return values, counts.astype(np.float64)


def _unchanged(n_rows: int) -> _Counted:
    return np.zeros(1), np.array([float(n_rows)])


def _log_growth(
    drops: _Counted, limit: float, span: float, shares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return, for each share, the log of what 1 has become after betting on all rows."""
    values, counts = drops
    # Products with a count of 0 do not occur, so -inf (a share of 1, a row at span) stays -inf.
    steps = shares[:, np.newaxis] * ((limit - values) / (span - limit))
    with np.errstate(divide="ignore"):
        growth: NDArray[np.float64] = np.log1p(np.maximum(steps, -1.0)) @ counts
    return growth
