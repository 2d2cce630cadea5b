# SPDX-License-Identifier: Apache-2.0
"""Relatives with a merged low-rank adapter, as ``merge_and_unload`` of LoRA leaves them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.types import DType

from .relatives import Model, added_beside

LOSSLESS = policies.Lossless()


def dense(tensors: int = 2, dtype: DType = DType.F32) -> Model:
    rng = np.random.default_rng(31)
    return {
        f"l{i}.weight": rng.normal(0, 0.02, (512, 384)).astype("f4").astype(dtype.numpy)
        for i in range(tensors)
    }


def adapted(model: Model, rank: int, seed: int = 32, share: float = 0.01) -> Model:
    """As after ``weight.data += (B @ A * scaling).to(weight.dtype)``; ``share`` of its size."""
    rng = np.random.default_rng(seed)

    def of(weight: NDArray[Any]) -> NDArray[Any]:
        rows, cols = weight.shape
        by = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, cols))
        by *= share * 0.02 / rank**0.5
        return weight + by.astype("f4").astype(weight.dtype)

    return {name: of(weight) for name, weight in model.items()}


def same_bits(store: pydedup.Store, name: str, model: Model) -> bool:
    loaded = store.load(name)
    return all(loaded[key].tobytes() == weight.tobytes() for key, weight in model.items())


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rank", "most"),
    [
        (DType.F32, 1, 0.05),
        (DType.F32, 8, 0.08),
        (DType.F32, 16, 0.12),
        (DType.BF16, 1, 0.10),
        (DType.BF16, 8, 0.12),
        (DType.BF16, 32, 0.16),
        (DType.F16, 8, 0.12),
    ],
)
def test_a_merged_adapter_takes_little_more_than_the_adapter(
    store: pydedup.Store, dtype: DType, rank: int, most: float, joint: bool
) -> None:
    base = dense(dtype=dtype)
    model = adapted(base, rank)
    report = added_beside(store, base, model, LOSSLESS, joint=joint, before=LOSSLESS)
    assert report.delta_blocks == report.blocks
    assert report.stored_bytes < most * report.logical_bytes
    assert same_bits(store, "m", model)
    assert store.verify().ok
