# SPDX-License-Identifier: Apache-2.0
"""Fine-tuned copies of a drawn model in a store, beside zipnn's delta, XOR + planes, and reminis.

    python bench/peers/variants.py [--only AREA] [--json]

32 tensors of 1024 x 1024 from N(0, 0.02), and a variant of them: fine-tuned, pruned, saved in a
wider dtype, or with an adapter merged; and what is made of a fine-tune, of 8 such tensors, or of 8
of 192 x 192, which are matched together (`--only small`).
Percentages are of the variant's own bytes: by how much the database grew, rows, indexes and
signatures included, against bytes of the peers' streams (and reminis' database). No one tells the
store what the variant is one of; the peers are told. "1 % of the spread" is noise of N(0, 0.0002)
on every weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from _stored import Finding, Scratch, Weights, main, reminis_share, xor_planes, zipnn_bytes
from numpy.typing import NDArray

from pydedup.policies import Accuracy, Bounded, Lossless, Policy
from pydedup.types import DType

TENSORS, SIDE = 32, 1024
# Tensors of models made of a fine-tune, and such models.
FEW, IN_A_ROW = 8, 8
SMALL_SIDE = 192
SPREAD = 0.02
BOUND = 0.001


def drawn(seed: int, dtype: Any = np.float32, spread: float = SPREAD) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        f"layer{i:02}": (rng.standard_normal((SIDE, SIDE), np.float32) * spread).astype(dtype)
        for i in range(TENSORS)
    }


def area(array: NDArray[Any]) -> tuple[slice, ...]:
    return tuple(map(slice, array.shape))


def moved(base: Weights, dtype: Any = np.float32, tensors: int = TENSORS) -> dict[str, Any]:
    """Return the weights with noise on those of the first tensors."""
    noise = drawn(1, spread=0.01 * SPREAD)
    return {
        name: (array.astype(np.float32) + noise[name][area(array)]).astype(dtype)
        if i < tensors
        else array
        for i, (name, array) in enumerate(base.items())
    }


def with_private_blocks(base: Weights) -> dict[str, Any]:
    """Return the weights with every eighth block of 128 rows drawn anew."""
    fresh = drawn(2)
    out = {}
    for i, (name, array) in enumerate(base.items()):
        copy = array.copy()
        at = i % 8 * 128
        copy[at : at + 128] = fresh[name][at : at + 128]
        out[name] = copy
    return out


def beside(
    case: str, base: Weights, version: Weights, policy: Policy, aim: float | None
) -> Iterator[Finding]:
    size = sum(array.nbytes for array in version.values())
    with Scratch() as scratch:
        scratch.add("base", base, Lossless())
        report = scratch.add("variant", version, policy)
        yield Finding(case, "pydedup", 100 * scratch.grown / size, "%", most=aim)
        yield Finding(case, "pydedup, blocks alone", 100 * report.stored_bytes / size, "%")
        yield Finding(case, "pydedup, add", scratch.seconds, "s")
        back = scratch.store.load("variant")
        if policy.max_rel_error == 0:
            same = all(back[n].tobytes() == a.tobytes() for n, a in version.items())
            if not same:
                raise SystemExit(f"{case}: what came back is not what went in")
        else:
            worst = max(
                np.linalg.norm(back[n].astype(np.float64) - a) / np.linalg.norm(a)
                for n, a in version.items()
            )
            yield Finding(case, "error of the worst tensor", float(worst), "", most=BOUND)
            return
    yield Finding(case, "XOR + planes + zstd-3", 100 * xor_planes(base, version) / size, "%")
    peer = zipnn_bytes(version, base)
    if peer is not None:
        yield Finding(case, "zipnn delta", 100 * peer / size, "%")
    share = reminis_share(base, version)
    if share is not None:
        yield Finding(case, "reminis", 100 * share, "%")


def lossless() -> Iterator[Finding]:
    """Yield the four cases that come back bit for bit."""
    base = drawn(0)
    quarter = moved(base, tensors=TENSORS // 4)
    yield from beside("a quarter of the tensors, f32", base, quarter, Lossless(), 16.9)
    yield from beside("1 % of the spread, f32", base, moved(base), Lossless(), 64.4)
    bf16 = DType.BF16.numpy
    half = drawn(0, bf16)
    yield from beside("1 % of the spread, bf16", half, moved(base, bf16), Lossless(), 34.2)
    private = with_private_blocks(base)
    yield from beside("1/8 of 128x1024 private, f32", base, private, Lossless(), 10.6)


def pruned(base: Weights, share: float, *, least: bool) -> dict[str, Any]:
    """Return the weights with a share of each tensor's set to 0: the least ones, or any."""
    rng = np.random.default_rng(3)
    out = {}
    for name, array in base.items():
        order = np.abs(array) if least else rng.random(array.shape, np.float32)
        out[name] = np.where(order < np.quantile(order, share), np.float32(0), array)
    return out


def pruned_or_widened() -> Iterator[Finding]:
    """Yield relatives of kinds that no peer and no paper names an aim for."""
    base = drawn(0)
    for share in (0.5, 0.9):
        for least in (True, False):
            case = f"{share:.0%} pruned, {'the least' if least else 'at random'}, f32"
            yield from beside(case, base, pruned(base, share, least=least), Lossless(), None)
    trained = pruned(moved(base), 0.9, least=True)
    yield from beside("90% pruned and trained on, f32", base, trained, Lossless(), None)
    bf16 = moved(base, DType.BF16.numpy)
    saved = {name: array.astype(np.float32) for name, array in bf16.items()}
    yield from beside("1 % of the spread, bf16 saved in f32", base, saved, Lossless(), None)


def adapted(base: Weights, rank: int, seed: int = 4) -> dict[str, Any]:
    """Return the weights after an adapter of 1 % of their spread was merged, as LoRA's are."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, array in base.items():
        up, down = (rng.standard_normal((side, rank), np.float32) for side in array.shape)
        by = up @ down.T * np.float32(0.01 * SPREAD / rank**0.5)
        out[name] = array + by.astype(array.dtype)
    return out


def within_bound(model: Weights) -> Accuracy:
    """Return a policy with a metric that falls once a tensor is farther away than the bound."""

    def evaluate(weights: Weights) -> float:
        away = (np.linalg.norm(weights[n] - a) / np.linalg.norm(a) for n, a in wide.items())
        return float(max(away) <= BOUND)

    wide = {name: array.astype(np.float64) for name, array in model.items()}
    return Accuracy(evaluate, 0, max_evaluations=20)


def merged() -> Iterator[Finding]:
    """Yield models with a merged low-rank adapter."""
    base = drawn(0)
    half = drawn(0, DType.BF16.numpy)
    for rank in (8, 32):
        for weights, label in ((base, "f32"), (half, "bf16")):
            case = f"an adapter of rank {rank} merged, {label}"
            yield from beside(case, weights, adapted(weights, rank), Lossless(), None)
    for weights, label in ((base, "f32"), (half, "bf16")):
        variant = adapted(weights, 8)
        case = f"an adapter of rank 8 merged, {label}, 0.1 %"
        yield from beside(case, weights, variant, Bounded(BOUND), None)
        yield from beside(f"{case} by a metric", weights, variant, within_bound(variant), None)


def stacked() -> Iterator[Finding]:
    """Yield experts, four to a tensor, each with an adapter, or each under a name of its own."""
    for dtype, label in ((np.float32, "f32"), (DType.BF16.numpy, "bf16")):
        base = drawn(0, dtype)
        experts = {
            f"{name}.{number}": matrix
            for name, array in base.items()
            for number, matrix in enumerate(array.reshape(4, SIDE // 2, SIDE // 2))
        }
        stacks = in_stacks(experts, base)
        case = f"adapters of rank 8 merged into stacked experts, {label}"
        yield from beside(case, stacks, in_stacks(adapted(experts, 8), base), Lossless(), None)
        yield from beside(f"experts that were stacked, {label}", experts, stacks, Lossless(), None)


def in_stacks(experts: Weights, names: Iterable[str]) -> dict[str, Any]:
    """Return the four experts of each of these names as one tensor."""
    return {name: np.stack([experts[f"{name}.{i}"] for i in range(4)]) for name in names}


def next_night(model: Weights, seed: int) -> dict[str, Any]:
    """Return the weights after 3 % of the rows were trained on, by 1 % of the spread."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, array in model.items():
        by = rng.standard_normal(array.shape, np.float32) * np.float32(0.01 * SPREAD)
        by *= rng.random((len(array), 1)) < 0.03
        out[name] = (array.astype(np.float32) + by).astype(array.dtype)
    return out


def in_a_row(case: str, models: Sequence[Weights], parents: Sequence[Weights]) -> Iterator[Finding]:
    """Yield what models take that come after a base and a fine-tune of it, and their parents."""
    sides: dict[str, list[float]] = {}
    seconds = []
    base, tuned, *rest = models
    with Scratch() as scratch:
        scratch.add("base", base, Lossless())
        scratch.add("tuned", tuned, Lossless())
        for number, (model, parent) in enumerate(zip(rest, parents, strict=True)):
            size = sum(array.nbytes for array in model.values())
            scratch.add(f"m{number}", model, Lossless())
            seconds.append(scratch.seconds)
            found = {"pydedup": scratch.grown, "XOR + planes + zstd-3": xor_planes(parent, model)}
            peer = zipnn_bytes(model, parent)
            if peer is not None:
                found["zipnn delta"] = peer
            for side, count in found.items():
                sides.setdefault(side, []).append(100 * count / size)
            back = scratch.store.load(f"m{number}")
            if not all(back[n].tobytes() == a.tobytes() for n, a in model.items()):
                raise SystemExit(f"{case}: what came back is not what went in")
    for side, shares in sides.items():
        yield Finding(case, f"{side}, each", float(np.mean(shares)), "%")
        yield Finding(case, f"{side}, the last", shares[-1], "%")
    yield Finding(case, "pydedup, add", float(np.median(seconds)), "s")


def derived() -> Iterator[Finding]:
    """Yield models made of a fine-tune that the store has as deltas; the peers know of what."""
    yield from made_of_a_fine_tune(dict(list(drawn(0).items())[:FEW]), "")


def small() -> Iterator[Finding]:
    """Yield the same of a model of small tensors, and an adapter merged into the first one."""
    tensors = list(drawn(0).items())[:FEW]
    model = {name: array[:SMALL_SIDE, :SMALL_SIDE].copy() for name, array in tensors}
    for dtype, label in ((np.float32, "f32"), (DType.BF16.numpy, "bf16")):
        base = {name: array.astype(dtype) for name, array in model.items()}
        case = f"small tensors, an adapter of rank 4 merged, {label}"
        yield from beside(case, base, adapted(base, 4), Lossless(), None)
    yield from made_of_a_fine_tune(model, "small tensors, ")


def made_of_a_fine_tune(model: Weights, kind: str) -> Iterator[Finding]:
    for dtype, label in ((np.float32, "f32"), (DType.BF16.numpy, "bf16")):
        base = {name: array.astype(dtype) for name, array in model.items()}
        tuned = moved(base, dtype)
        tenants = [adapted(tuned, 8, seed) for seed in range(IN_A_ROW)]
        case = f"{kind}{IN_A_ROW} adapters of rank 8 merged into a fine-tune, {label}"
        yield from in_a_row(case, [base, tuned, *tenants], [tuned] * IN_A_ROW)
        nights: list[Weights] = [tuned]
        for seed in range(IN_A_ROW):
            nights.append(next_night(nights[-1], seed))
        case = f"{kind}{IN_A_ROW} nights after a fine-tune, 3 % of the rows each, {label}"
        yield from in_a_row(case, [base, *nights], nights[:-1])


def bounded() -> Iterator[Finding]:
    """Yield the full fine-tune within 0.1 % of each block's norm."""
    base = drawn(0)
    yield from beside("1 % of the spread, f32, 0.1 %", base, moved(base), Bounded(BOUND), 14.0)


if __name__ == "__main__":
    main(__doc__, [lossless, pruned_or_widened, merged, stacked, derived, small, bounded])
