# SPDX-License-Identifier: Apache-2.0
"""ONNX models that ONNX Runtime runs for a store beside ONNX Runtime with the same files.

    python bench/peers/onnx_models.py [--seconds S] [--only AREA] [--json]

Everything is in memory: two threads on both sides. ``transformer`` is MiniLM's ONNX export,
``quantised`` the same with weights of int8, by onnxruntime.quantization. The second store has room
for the weights and half as much again, so that its sessions have the weights as inputs. Outputs
are compared with ONNX Runtime's before anything is timed. Needs onnx, onnxruntime and transformers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from _minilm import export
from _timing import Row, compare, main
from onnxruntime.quantization import quantize_dynamic
from released import members, only
from safetensors.numpy import load as load_safetensors

import pydedup

#: Sentences and words of a call.
SIZES = ((1, 12), (1, 128), (8, 32))
#: Of a budget, what is no pool.
SCRATCH = 48 << 20


def beside(case: str, path: Path, seconds: float, most: float) -> Iterator[Row]:
    """Yield a model of two stores beside its file; outputs may differ by ``most``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    # As pydedup has it: one's spinning threads would take the cores that the other uses next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        place = Path(folder) / "m.db"
        with pydedup.open(place) as store:
            little = SCRATCH + store.add("m", path).logical_bytes * 3 // 2
        with (
            pydedup.open(place, mode="r", memory="1GiB") as own,
            pydedup.open(place, mode="r", memory=little) as shared,
        ):
            for rows, words in SIZES:
                ids = np.random.default_rng(7).integers(1000, 30000, (rows, words))
                given = {"ids": ids, "mask": np.ones_like(ids)}
                (wanted,) = session.run(None, given)
                for store in (own, shared):
                    for _ in range(2):
                        (got,) = store.predict("m", given).values()
                        error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
                        assert error < most, f"{case}: wrong by {error}"
                yield from compare(
                    f"{case}, {rows} x {words} words",
                    unit="ms",
                    sides={
                        "pydedup": lambda g=given: own.predict("m", g),  # type: ignore[misc]
                        "ONNX Runtime": lambda g=given: session.run(None, g),  # type: ignore[misc]
                        "pydedup, little memory": lambda g=given: shared.predict("m", g),  # type: ignore[misc]
                    },
                    seconds=seconds,
                    target={"ONNX Runtime": 1.0},
                )


def transformer(seconds: float) -> Iterator[Row]:
    """Yield MiniLM's export in f32."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder) / "minilm.onnx"
        export(load_safetensors(only(members("base", "model.safetensors"))), path, any_size=True)
        yield from beside("MiniLM", path, seconds, 1e-4)


def quantised(seconds: float) -> Iterator[Row]:
    """Yield the same with weights of int8, whose inputs are quantised in each call."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path, small = Path(folder) / "minilm.onnx", Path(folder) / "int8.onnx"
        export(load_safetensors(only(members("base", "model.safetensors"))), path, any_size=True)
        quantize_dynamic(path, small)
        yield from beside("MiniLM in int8", small, seconds, 0.05)


if __name__ == "__main__":
    main(__doc__, [transformer, quantised])
