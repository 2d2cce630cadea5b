# SPDX-License-Identifier: Apache-2.0
"""Adding a model and one that descends from it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import pydedup
from pydedup.policies import Exact, Policy
from pydedup.types import DType

Model = dict[str, NDArray[Any]]

_EXACT = Exact()


def added_beside(
    store: pydedup.Store,
    base: Model,
    model: Model,
    policy: Policy,
    *,
    joint: bool,
    before: Policy = _EXACT,
) -> pydedup.AddReport:
    """Add a model after its relative, which comes under ``before``, or with it in one call."""
    if joint:
        return store.add_many({"base": base, "m": model}, policy=policy)[1]
    store.add("base", base, policy=before)
    return store.add("m", model, policy=policy)


def weights() -> NDArray[np.float32]:
    """Return a drawn matrix."""
    return np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)


def moved(array: NDArray[np.float32], by: float = 0.01) -> NDArray[np.float32]:
    """Return a matrix of which every weight moved a little, as a fine-tune does."""
    noise = np.random.default_rng(1).standard_normal(array.shape)
    return (array + by * noise).astype(np.float32)


def dense(tensors: int = 2, dtype: DType = DType.F32) -> Model:
    """Return weights of a drawn model."""
    rng = np.random.default_rng(31)
    return {
        f"l{i}.weight": rng.normal(0, 0.02, (512, 384)).astype("f4").astype(dtype.numpy)
        for i in range(tensors)
    }


def adapted(model: Model, rank: int, seed: int = 32, share: float = 0.01) -> Model:
    """Return weights + (B @ A * scaling).to(their dtype), that part of them, as LoRA does.

    Of a stack of matrices, each has its own.
    """
    rng = np.random.default_rng(seed)

    def of(weight: NDArray[Any]) -> NDArray[Any]:
        *outer, rows, cols = weight.shape
        by = rng.normal(size=(*outer, rows, rank)) @ rng.normal(size=(*outer, rank, cols))
        by *= share * 0.02 / rank**0.5
        return weight + by.astype("f4").astype(weight.dtype)

    return {name: of(weight) for name, weight in model.items()}


def share_of(report: pydedup.AddReport) -> float:
    """Return what the blocks of a model took of its size."""
    return report.stored_bytes / report.logical_bytes


def same_bits(store: pydedup.Store, name: str, model: Model) -> bool:
    """Return whether a stored model has these very bits."""
    loaded = store.load(name)
    return all(loaded[key].tobytes() == weight.tobytes() for key, weight in model.items())
