# SPDX-License-Identifier: Apache-2.0
"""Matrix products beside torch: a weight that stays on the pages of a pool against one held whole.

python bench/peers/kernels.py [--seconds S] [--json]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _timing import Row, compare, main

import pydedup
from pydedup import policies

SIZE = 4096


def matmul(seconds: float) -> Iterator[Row]:
    """Yield f32 products with 4096x4096 weights, two threads on both sides."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((SIZE, SIZE), np.float32) * np.float32(0.02)
    torch.set_num_threads(2)
    whole = torch.from_numpy(weight)
    with tempfile.TemporaryDirectory() as folder, pydedup.open(Path(folder) / "m.db") as store:
        store.add("m", {"w": weight}, policy=policies.Exact())
        stored = store.tensor("m", "w")
        for m in (1, 8, 32, 128, 512):
            x = rng.standard_normal((m, SIZE), np.float32)
            given = torch.from_numpy(x)
            reference = x.astype(np.float64) @ weight.T.astype(np.float64)
            error = np.abs(stored.matmul(x) - reference).max() / np.abs(reference).max()
            assert error < 1e-5, f"m={m}: wrong by {error}"
            yield from compare(
                f"x @ W.T, {SIZE}x{SIZE} f32 from pages, m={m}, 2 threads",
                unit="GFLOP/s",
                work=2.0 * m * SIZE * SIZE,
                sides={
                    "pydedup": lambda x=x: stored.matmul(x),  # type: ignore[misc]
                    "torch": lambda g=given: torch.nn.functional.linear(g, whole),  # type: ignore[misc]
                },
                seconds=seconds,
            )


if __name__ == "__main__":
    main(__doc__, [matmul])
