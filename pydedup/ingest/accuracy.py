# SPDX-License-Identifier: Apache-2.0
"""The search of the policy `Accuracy`: which blocks may be replaced before the metric falls.

`choose` is given the model's tensors and, for each block that has them, contents to try instead,
the most saving first (a stored block, then quantised deltas). Rounds, each a search of
``searches.py`` over the blocks in order:

1. for each of a few small errors, ascending: every block to its most saving content that is as near
   as that, for the smallest one all at once to begin with. Little harm for most of the savings, and
   whatever stops the search later, blocks that are not shared are deltas at least;
2. every block to its most saving content, in batches: what the tolerance is for;
3. if asked for, fine-tuning of all that is not replaced, and round 2 again for what it refused;
4. blocks that round 2 refused to the contents in between, the most saving first;
5. what rounds 2 to 4 did not reach. Each of them leaves half of the evaluations to those after it,
   which may have little to do.

With confidence the order matters twice: judging rows that refuse a state end the search for good,
so what does the least harm for what it saves comes first.

Every state that is accepted was evaluated as a whole, with all replacements in it, so the last one
accepted, which is what `choose` leaves in the arrays, meets the tolerance and never by adding up
estimates. Storage and databases are not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.accuracy import Accuracy
from pydedup.arguments import as_array
from pydedup.blocks import matrix_shape
from pydedup.errors import ArgumentError, EvaluationError, PydedupError
from pydedup.ingest.judging import read_only
from pydedup.ingest.overtime import Overtime
from pydedup.ingest.searches import SEARCHES
from pydedup.ingest.trial import KEPT, Replacement, RoundOver, Trial

__all__ = ["GENTLE", "Choice", "Replacement", "choose"]

#: Relative errors of blocks up to which rounds of their own go; all but the first in batches.
GENTLE = (0.001, 0.005, 0.03)

#: First batch of "bisect", as one in so many blocks; the largest one with confidence, where the
#: judging rows may end the search and the last state that they accepted should not lie far back.
_FIRST = 8
_LARGEST_JUDGED = 32
#: Steps of the search "step" unless the user says how many blocks one has; the paper took 5 blocks.
_STEPS, _STEP_BLOCKS = 32, 5

Area = tuple[slice, slice]


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes
    ----------
    levels
        int64, one per replacement: the level taken, or -1 where the block stays as it is.
    certificate
        How it was found and what holds, a JSON object.
    finetuned
        Tensors that fine-tuning changed; what is to be stored of them is in the arrays.
    errors
        Largest relative L2 change of a replaced block, by tensor; of those that have one.
    """

    levels: NDArray[np.int64]
    certificate: dict[str, Any]
    finetuned: frozenset[str]
    errors: dict[str, float]


def choose(
    weights: Mapping[str, NDArray[Any]],
    replacements: Sequence[Replacement],
    policy: Accuracy,
    *,
    shared: Mapping[str, Sequence[Area]] | None = None,
    row_axes: Mapping[str, int] = MappingProxyType({}),
    tell: Callable[[str, int], None] | None = None,
) -> Choice:
    """Replace what the policy allows, and leave the chosen state in ``weights``.

    Parameters
    ----------
    weights
        The model's tensors by name, C-contiguous, writeable and owned by the caller: they are
        changed in place. Tied ones are one array under several names. After an exception they
        hold nothing of use.
    replacements
        At most one per block.
    shared
        Blocks of the matrix views that are stored already, bit for bit, so that fine-tuning had
        better not change them.
    row_axes
        By name, how many of a tensor's axes are the rows of its matrix view, where that is not what
        its shape tells.
    tell
        Told, before each evaluation, which one it is, and of fine-tuning.

    Returns
    -------
    Choice
        The same for the same arguments, if ``evaluate`` and ``finetune`` are deterministic.

    Raises
    ------
    EvaluationError
        When a callable of the policy raises or returns what cannot be used.
    ArgumentError
        When confidence needs more validation examples, saliency does not fit the tensors, or a
        replacement does not fit its tensor.
    """
    trial = Trial(weights, replacements, policy, row_axes, tell)
    order = _ordered(weights, replacements, policy, row_axes)
    gentlest = [len(r.levels) - 1 for r in replacements]
    deepest = max(gentlest, default=0)
    too_much: set[int] = set()

    def search(
        wanted: Mapping[int, int], batch: int | None = None, *, last: bool
    ) -> dict[int, int]:
        # A level is worth its harm if it saves more than what the block has already.
        now = {i: int(trial.levels[i]) for i in wanted}
        saves = {i: replacements[i].saved[now[i]] if now[i] != KEPT else 0 for i in wanted}
        better = {i: k for i, k in wanted.items() if replacements[i].saved[k] > saves[i]}
        return _run(trial, better, batch, last=last)

    for error in GENTLE:
        near = {i: replacements[i].within(error) for i in order if i not in too_much}
        wanted = {i: level for i, level in near.items() if level is not None}
        batch = len(order) if error == GENTLE[0] else -(-len(order) // _FIRST)
        search(wanted, batch, last=False)
        too_much = set(trial.refused)
    shares = dict.fromkeys(order, 0)
    unreached = [search(shares, last=not deepest and policy.finetune is None)]
    finetuned: frozenset[str] = frozenset()
    if policy.finetune is not None:
        finetuned = _finetune(trial, policy, shared or {}, tell)
        if finetuned:
            unreached = [search(shares, last=not deepest)]
    for level in range(1, deepest + 1):
        # The gentlest level again, for blocks that its round did not reach.
        left = [i for i in order if level <= gentlest[i] and i not in too_much]
        unreached.append(search(dict.fromkeys(left, level), last=level == deepest))
    for wanted in unreached:  # with the evaluations that were kept for rounds that had little to do
        search(wanted, last=True)
    errors = trial.errors()
    # What never refused anything may be unable to: labels of other data, a score of a module that
    # was not given the weights. Told is who has to know; what they asked for is kept.
    unharmed = not (trial.refused or trial.closed) and ((trial.levels >= 0).any() or finetuned)
    of_zeros: dict[str, float | None] = {}
    if unharmed and trial.evaluations < policy.max_evaluations:
        try:
            of_zeros["metric_of_zeros"] = trial.metric_of_zeros()
        except Overtime:
            of_zeros["zeros_ended_after"] = round(trial.patience_seconds, 1)
    certificate = _certificate(trial, policy, replacements, finetuned)
    certificate.update((key, value) for key, value in of_zeros.items() if value is not None)
    certificate["largest_block_error"] = max(errors.values(), default=0.0)
    return Choice(trial.levels, certificate, finetuned, errors)


def _run(
    trial: Trial, wanted: Mapping[int, int], batch: int | None, *, last: bool
) -> dict[int, int]:
    """Search one round: blocks, in order, and the level wanted for each.

    ``batch`` is the size of the first batch of a round of small errors; the papers have no such
    round, so the policy has no say in how it is searched. Unless it is the last one, it may use up
    to half of the evaluations that are left. Returns of ``wanted`` what it did not reach with them.
    """
    if not wanted or trial.closed:
        return {}
    policy, blocks, n = trial.policy, list(wanted), len(wanted)
    name = policy.search
    first, largest = max(1, -(-n // _FIRST)), n
    if name == "step":
        first = max(_STEP_BLOCKS, -(-n // _STEPS))
    if policy.every is not None:
        first = policy.every
    elif policy.confidence is not None:
        largest = max(1, -(-n // _LARGEST_JUDGED))
    if batch is not None:
        name, first, largest = "bisect", batch, n if policy.confidence is None else batch
    left = policy.max_evaluations - trial.evaluations
    trial.quota = trial.evaluations + (left if last else -(-left // 2))
    search = SEARCHES[name](blocks, lambda blocks: trial.attempt(blocks, wanted), first, largest)
    refused: set[int] = set()
    try:
        for block in search:
            refused.add(block)
            trial.refused.add(block)
            if name != "bisect":
                trial.ended = "a batch did too much harm"
    except RoundOver:
        if not trial.closed:
            return {i: k for i, k in wanted.items() if trial.levels[i] != k and i not in refused}
    return {}


def _ordered(
    weights: Mapping[str, NDArray[Any]],
    replacements: Sequence[Replacement],
    policy: Accuracy,
    row_axes: Mapping[str, int],
) -> list[int]:
    """Return the replacements in the order in which they are tried."""
    if policy.order == "magnitude":
        keys = [(-r.layer_bytes, r.magnitude) for r in replacements]
        return sorted(range(len(keys)), key=keys.__getitem__)
    given = policy.saliency
    if callable(given):
        try:
            given = given(read_only(weights))
        except PydedupError:
            raise
        except Exception as error:
            raise EvaluationError(f"saliency raised {type(error).__name__}: {error}") from error
    given_as: object = given
    if not isinstance(given_as, Mapping):
        raise ArgumentError(
            f"saliency is {type(given_as).__name__}, not arrays by name, which a callable must "
            "return"
        )
    assert given is not None
    means = np.empty(len(replacements))
    for index, replacement in enumerate(replacements):
        name = replacement.tensor
        if name not in given:
            raise ArgumentError(f"saliency has no tensor {name!r}; it needs those of the model")
        array = as_array(given[name], f"saliency of {name!r}")
        if array.shape != weights[name].shape:
            raise ArgumentError(
                f"saliency of {name!r} has the shape {array.shape}, the tensor "
                f"{weights[name].shape}"
            )
        matrix = array.reshape(matrix_shape(array.shape, row_axes.get(name)))
        block = matrix[replacement.rows, replacement.cols]
        try:
            means[index] = np.abs(block.astype(np.float64, casting="same_kind")).mean()
        except TypeError as error:
            raise ArgumentError(f"saliency of {name!r} is {array.dtype}, not numbers") from error
        if not np.isfinite(means[index]):
            raise ArgumentError(f"saliency of {name!r} holds NaN or infinity")
    return [int(index) for index in np.argsort(means, kind="stable")]


def _finetune(
    trial: Trial,
    policy: Accuracy,
    shared: Mapping[str, Sequence[Area]],
    tell: Callable[[str, int], None] | None,
) -> frozenset[str]:
    """Let the user train what is not replaced; return the tensors that changed, if it helped."""
    assert policy.finetune is not None
    if trial.closed or trial.evaluations >= policy.max_evaluations:
        return frozenset()
    weights = trial.weights
    masks = trial.frozen(shared)
    if tell is not None:
        tell("fine-tuning", 0)
    try:
        result = policy.finetune(read_only(weights), read_only(masks))
    except PydedupError:
        raise
    except Exception as error:
        raise EvaluationError(f"finetune raised {type(error).__name__}: {error}") from error
    if not isinstance(result, Mapping):
        raise EvaluationError(f"finetune returned {type(result).__name__}, not arrays by name")
    if unknown := sorted(map(repr, set(result) - set(weights))):
        raise EvaluationError(f"finetune returned {unknown[0]}, which the model does not have")
    changed: dict[str, NDArray[Any]] = {}
    tied: dict[int, tuple[str, NDArray[Any]]] = {}
    for name, value in result.items():
        old = weights[name]
        try:
            array = as_array(value, f"what finetune returned for {name!r}")
        except ArgumentError as error:
            raise EvaluationError(str(error)) from error
        if array.shape != old.shape or array.dtype != old.dtype:
            raise EvaluationError(
                f"finetune returned {array.dtype} {array.shape} for {name!r}, "
                f"which is {old.dtype} {old.shape}"
            )
        array = np.ascontiguousarray(array).reshape(old.shape)
        twin, other = tied.setdefault(id(old), (name, array))
        if not np.array_equal(bits(array), bits(other)):
            raise EvaluationError(f"finetune made {name!r} and {twin!r} differ, which are tied")
        differs = bits(array) != bits(old)
        if (differs & masks[name]).any():
            raise EvaluationError(
                f"finetune changed {int((differs & masks[name]).sum()):,} frozen elements of "
                f"{name!r}; give those their values back after each step, as torch_finetune does"
            )
        if differs.any():
            changed[name] = array
    return frozenset(changed) if changed and trial.adopt(changed) else frozenset()


def bits(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array as unsigned integers, so that NaN equals itself and 0 is not -0."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _certificate(
    trial: Trial, policy: Accuracy, replacements: Sequence[Replacement], finetuned: frozenset[str]
) -> dict[str, Any]:
    judge, levels = trial.judge, trial.levels
    taken = np.bincount(levels[levels >= 0], minlength=1)
    refused = sum(levels[index] == KEPT for index in trial.refused)
    bound = judge.bound(trial.accepted)
    if bound is not None and not (levels >= 0).any() and not finetuned:
        bound = 0.0

    def count(rows: NDArray[Any] | None) -> int | None:
        return None if rows is None else len(rows)

    return {
        "policy": policy.name,
        **policy.parameters(),
        "metric_before": judge.before.metric,
        "metric_after": trial.accepted.metric,
        "metric_drop": judge.before.metric - trial.accepted.metric,
        "bound": bound,
        "rows": {
            "all": count(judge.before.scores),
            "steering": count(judge.steering),
            "judging": count(judge.judging),
        },
        "evaluations": trial.evaluations,
        "noise": judge.noise,
        "blocks": len(replacements),
        "replaced": int((levels >= 0).sum()),
        "shared": sum(r.shares for r, k in zip(replacements, levels, strict=True) if k == 0),
        "refused": int(refused),
        "untried": int((levels == KEPT).sum()) - int(refused),
        "levels": taken.tolist(),
        "saved": sum(r.saved[k] for r, k in zip(replacements, levels, strict=True) if k >= 0),
        "finetuned": bool(finetuned),
        "ended": trial.ended if replacements else "there was nothing to replace",
    }
