# SPDX-License-Identifier: Apache-2.0
"""Two tenants, one base model: store both, see what they share, predict from the pages.

    python examples/quickstart.py

Needs nothing but pydedup. The models are random; they imitate an embedding classifier of which a
fine-tune moved the rows of the words that it saw.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import pydedup
from pydedup.graph import Graph, Node


def main() -> None:
    """Run the example in a temporary folder."""
    rng = np.random.default_rng(0)
    base = {
        "embedding": rng.standard_normal((20_000, 64), np.float32),
        "head.weight": rng.standard_normal((5, 64), np.float32),
        "head.bias": np.zeros(5, np.float32),
    }
    tenant = {name: tensor.copy() for name, tensor in base.items()}
    tenant["embedding"][:2_000] += rng.standard_normal((2_000, 64), np.float32) * 0.1

    graph = Graph(
        inputs=("words",),
        outputs=("logits",),
        nodes=(
            Node("embedding_bag", ("words",), "text", {"weight": "embedding"}, {"mode": "mean"}),
            Node("linear", ("text",), "logits", {"weight": "head.weight", "bias": "head.bias"}),
        ),
    )
    with tempfile.TemporaryDirectory() as folder, pydedup.open(Path(folder) / "models.db") as store:
        for name, model in (("base", base), ("tenant-a", tenant)):
            report = store.add(name, model, graph=graph)
            print(
                f"{report.model}: {report.logical_bytes:,} bytes of weights, "
                f"{report.stored_bytes:,} new in the store; "
                f"{report.shared_blocks} of {report.blocks} blocks were there"
            )
        words = rng.integers(0, 20_000, (3, 12))
        logits = store.predict("tenant-a", words)
        expected = tenant["embedding"][words].mean(axis=1) @ tenant["head.weight"].T
        print(f"logits of 3 texts; off by at most {np.abs(logits - expected).max():.1e} from numpy")
        loaded = store.load("tenant-a")
        same = all(np.array_equal(loaded[name], tenant[name]) for name in tenant)
        print(f"loaded back bit for bit: {same}; store verified: {store.verify().ok}")


if __name__ == "__main__":
    main()
