# SPDX-License-Identifier: Apache-2.0
"""The policy `Accuracy`: what a user says of their metric. `pydedup.policies` re-exports it.

Not here: the search that keeps the promise (``ingest/accuracy.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from pydedup.arguments import as_count
from pydedup.errors import ArgumentError
from pydedup.words import Order, Search, check_word

__all__ = ["Accuracy", "Arrays", "number"]

#: Tensors, or what goes with them, by name.
Arrays: TypeAlias = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Accuracy:
    """The user's own metric falls by at most ``max_drop``; what that allows is shared.

    A block is replaced by a stored one that is near enough, else by a quantised delta on one, else
    kept as it is. What is stored is always a state that was itself evaluated and met the tolerance.
    A metric looks better on the very examples that chose what is stored: keep a held-out set, and
    use ``confidence``.

    Where nothing was refused, ``evaluate`` is called once more, if it may be, with zeros for all
    floats. If the metric falls by no more than ``max_drop`` even then, it guards nothing: a warning
    and the certificate say so. Where ``evaluate`` raises an exception for zeros, nothing is said;
    where it takes ten times as long as ever before, and a minute, it is ended by an exception, as
    Ctrl-C does it, which the two say as well.
    It is the last call: a module of your own that ``evaluate`` fills holds zeros then, while
    `torch_evaluate` gives a module back its own weights.

    Parameters
    ----------
    evaluate
        Maps the model's tensors by name (read-only arrays in their original shapes) to a number,
        or to a 1-D array with one score per validation example; higher is better. It must give the
        same result for the same weights and leave the model that is added unchanged; the arrays
        change after each call. `torch_evaluate` makes one from a torch module.
    max_drop
        How far the metric (the mean of scores) may fall, in its own units: 0.005 is half a point
        of accuracy. 0 allows no fall at all.
    confidence
        Such as 0.95: the drop on data like the validation examples, not only on these, is at most
        ``max_drop`` with this probability. Needs scores per example, independent examples that
        neither ``saliency`` nor ``finetune`` used, and enough of them; see
        ``pydedup/ingest/confidence.py`` for the method.
    order
        "magnitude": largest layer first, within it by ascending third quartile of the absolute
        weights, as in the paper (Zhou et al., PVLDB 15(10), 2022). "saliency": by ascending mean
        of ``saliency``, as in its successor (Guan et al., SIGMOD 2025).
    search
        "bisect" (batches grow; a bad one is searched for its bad block, which alone is refused),
        "step" (the paper's: stop at the first batch that does too much harm) or "halving" (its
        successor's: half of what is left; where that does too much harm, half of that, and so on).
    every
        Blocks per evaluation: of all steps, or of the first batch. By default 5 or a 32nd of the
        blocks, whichever is more, for steps, and an eighth of the blocks for "bisect".
    finetune
        Called once with (arrays by name, boolean masks by name of the elements that must not
        change); returns arrays by name: the model trained further, with shared blocks frozen. The
        result is kept if the metric is better. `torch_finetune` makes one from a torch module.
    seed
        With ``confidence``: draws which examples steer the search and which judge its result.
    saliency
        For ``order="saliency"``: arrays by name, shaped like the tensors, of
        abs(gradient * weight), or a callable that returns them for the model's arrays.
        `torch_saliency` computes them.
    max_evaluations
        ``evaluate`` is called no more often; blocks that were not reached stay lossless, or deltas.
    max_rel_error
        Blocks are replaced only by what is this near to them (relative Euclidean norm), whatever
        the metric would allow: a metric does not see everything.
    score_range
        (lowest, highest) score that an example can have; only needed with ``confidence``.
    deterministic
        False for an ``evaluate`` whose results vary from call to call: the difference between two
        calls on the unchanged weights then counts as part of every drop. Not with ``confidence``.

    Raises
    ------
    ArgumentError
        For a value out of range, or two that do not go together.
    """

    name = "accuracy"
    compresses = True
    uses_deltas = True

    evaluate: Callable[[Arrays], Any]
    max_drop: float
    _: KW_ONLY
    confidence: float | None = None
    order: Order = "magnitude"
    search: Search = "bisect"
    every: int | None = None
    finetune: Callable[[Arrays, Arrays], Arrays] | None = None
    seed: int = 0
    saliency: Arrays | Callable[[Arrays], Arrays] | None = None
    max_evaluations: int = 128
    max_rel_error: float = 0.25
    score_range: tuple[float, float] = (0.0, 1.0)
    deterministic: bool = True

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise ArgumentError(f"evaluate must be callable, got {self.evaluate!r}")
        if self.finetune is not None and not callable(self.finetune):
            raise ArgumentError(f"finetune must be callable or None, got {self.finetune!r}")
        for name, value in (("max_drop", self.max_drop), ("max_rel_error", self.max_rel_error)):
            if not number(name, value) >= 0:
                raise ArgumentError(f"{name} must be 0 or more, got {value!r}")
            object.__setattr__(self, name, number(name, value))
        check_word("order", self.order, get_args(Order))
        check_word("search", self.search, get_args(Search))
        if (self.order == "saliency") != (self.saliency is not None):
            raise ArgumentError(
                'order="saliency" and saliency go together: give both, or neither for the order '
                "by magnitude"
            )
        for name, count, least in (
            ("every", self.every, 1),
            ("seed", self.seed, 0),
            ("max_evaluations", self.max_evaluations, 3),
        ):
            if name == "every" and count is None:
                continue
            object.__setattr__(self, name, as_count(name, count, least=least, most=2**64 - 1))
        deterministic: object = self.deterministic
        if not isinstance(deterministic, bool | np.bool_):
            raise ArgumentError(f"deterministic must be True or False, not {deterministic!r:.100}")
        object.__setattr__(self, "deterministic", bool(deterministic))
        self._check_scores()

    def parameters(self) -> dict[str, Any]:
        """Return what the certificate says of the policy beside its name, in JSON's types."""
        return {
            "max_drop": self.max_drop,
            "confidence": self.confidence,
            "order": self.order,
            "search": self.search,
            "every": self.every,
            "seed": self.seed,
            "max_evaluations": self.max_evaluations,
            "max_rel_error": self.max_rel_error,
            "score_range": list(self.score_range),
            "deterministic": self.deterministic,
        }

    def _check_scores(self) -> None:
        try:
            lowest, highest = (number("score_range", value) for value in self.score_range)
        except (TypeError, ValueError):
            lowest, highest = 0.0, 0.0
        if not lowest < highest:
            raise ArgumentError(
                f"score_range must be two numbers (lowest, highest), got {self.score_range!r}"
            )
        object.__setattr__(self, "score_range", (lowest, highest))
        if self.confidence is None:
            return
        confidence = number("confidence", self.confidence)
        if not 0 < confidence < 1:
            raise ArgumentError(
                f"confidence must lie between 0 and 1, such as 0.95; got {self.confidence!r}"
            )
        object.__setattr__(self, "confidence", confidence)
        if not self.deterministic:
            raise ArgumentError(
                "confidence needs an evaluate that gives the same scores for the same weights: "
                "chance that affects all examples of a call alike could pass for a drop, or hide "
                "one; fix its seed, or leave confidence out"
            )
        if self.max_drop == 0:
            raise ArgumentError(
                "no number of examples shows that a metric does not fall at all: give a "
                "max_drop above 0 with confidence, or leave confidence out"
            )


def number(name: str, value: Any) -> float:
    """Return an argument of a policy as a float. Raises ArgumentError unless it is finite."""
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        converted = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(f"{name} must be a number, got {value!r}") from error
    if not math.isfinite(converted):
        raise ArgumentError(f"{name} must be finite, got {value!r}")
    return converted
