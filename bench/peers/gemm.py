# SPDX-License-Identifier: Apache-2.0
"""Products with a weight on the pages of a pool beside torch, ONNX Runtime and numpy.

    python bench/peers/gemm.py [--seconds S] [--only AREA] [--json]

A weight of 4096 x 4096, two threads on all sides (numpy takes what it finds: OPENBLAS_NUM_THREADS=2
on a larger machine), everything in memory. f32: x @ W.T beside the three. bf16: the weight in bf16
beside our own f32 and beside torch, both given x in bf16; and given x in f32, which torch cannot
take. transposed: x @ W. batches: layers of a small transformer (MiniLM's) with the rows of a large
batch beside torch: all in f32, and all in bf16, results as well. avx2: f32 and bf16 once more in
another process, where both sides may use no more than AVX2 (PYDEDUP_KERNEL, ATEN_CPU_CAPABILITY,
ONEDNN_MAX_CPU_ISA, and for Intel's CPUs MKL_ENABLE_INSTRUCTIONS).

The products of every side are held against float64 before they are timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from _timing import Row, compare, main
from numpy.typing import NDArray

import pydedup
from pydedup import policies

Array = NDArray[Any]
SIZE = 4096
THREADS = 2
ROWS = (1, 8, 32, 128, 512)
#: The ratios to reach for each of ROWS: of the fastest peer, and of torch.
OF_FASTEST = dict(zip(ROWS, (1.0, 1.15, 1.3, 1.0, 1.05), strict=True))
OF_TORCH = dict(zip(ROWS, (1.5, 2.5, 1.7, 1.25, 1.15), strict=True))
#: Rows of a batch, and (outputs, inputs) of layers.
BATCHES = (1024, 8192)
LAYERS = ((384, 384), (1536, 384), (384, 1536))
OF_OWN_F32 = {1: 1.6, 128: 1.6, 512: 1.6}
ONLY_AVX2 = {
    "PYDEDUP_KERNEL": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


@contextmanager
def stored(**tensors: Array) -> Iterator[dict[str, Any]]:
    """Yield these tensors as stored ones, whose pages are in the pool after the first use."""
    with tempfile.TemporaryDirectory() as folder, pydedup.open(Path(folder) / "m.db") as store:
        store.add("m", tensors, policy=policies.Exact())
        yield {name: store.tensor("m", name) for name in tensors}


def make_weight() -> Array:
    rng = np.random.default_rng(0)
    return rng.standard_normal((SIZE, SIZE), np.float32) * np.float32(0.02)


def make_x(m: int, width: int = SIZE) -> Array:
    return np.random.default_rng(m).standard_normal((m, width), np.float32)


def check(name: str, got: object, x: Array, w: Array, within: float) -> None:
    """Stop unless this is x @ w, to so much of the largest element."""
    exact = x.astype(np.float64) @ w.astype(np.float64)
    if isinstance(got, torch.Tensor):
        got = got.float().numpy()
    error = np.abs(np.asarray(got, np.float64) - exact).max() / np.abs(exact).max()
    assert error < within, f"{name}, m={len(x)}: wrong by {error}"


def ort_matmul(w: Array) -> Callable[[Array], Callable[[], Array]]:
    """Return a function of x that returns the call of ONNX Runtime's x @ w."""
    helper = onnx.helper
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", kind, ["m", SIZE])],
        [helper.make_tensor_value_info("y", kind, ["m", SIZE])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(w), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def of(x: Array) -> Callable[[], Array]:
        given = {"x": onnxruntime.OrtValue.ortvalue_from_numpy(x)}
        return lambda: session.run_with_ort_values(["y"], given)[0]  # type: ignore[no-any-return]

    return of


def rows(
    what: str,
    m: int,
    sides: Mapping[str, Callable[[], object]],
    seconds: float,
    target: float | Mapping[str, float] | None = None,
    weights: int = SIZE * SIZE,
) -> Iterator[Row]:
    """Yield the rows of one product with so many weights."""
    yield from compare(
        f"{what}, m={m}",
        unit="GFLOP/s",
        work=2.0 * m * weights,
        sides=sides,
        seconds=seconds,
        target=target,
        settle=True,
    )


def f32(seconds: float) -> Iterator[Row]:
    """Yield x @ W.T beside torch, ONNX Runtime and numpy, and beside the fastest of them."""
    weight = make_weight()
    whole = torch.from_numpy(weight)
    ort = ort_matmul(weight.T)
    with stored(w=weight) as tensors:
        ours = tensors["w"]
        for m in ROWS:
            x = make_x(m)
            given = torch.from_numpy(x)
            asked = ort(x)
            sides: dict[str, Callable[[], object]] = {
                "pydedup": lambda x=x: ours.matmul(x),  # type: ignore[misc]
                "torch": lambda g=given: torch.nn.functional.linear(g, whole),  # type: ignore[misc]
                "onnxruntime": lambda asked=asked: asked().numpy(),  # type: ignore[misc]
                "numpy": lambda x=x: x @ weight.T,  # type: ignore[misc]
            }
            for name, side in sides.items():
                check(name, side(), x, weight.T, 1e-5)
            sides["onnxruntime"] = asked
            found = list(rows("x @ W.T, f32", m, sides, seconds, {"torch": OF_TORCH[m]}))
            yield from found
            best = min(found, key=lambda row: row.ratio)
            yield replace(best, peer=f"fastest ({best.peer})", target=OF_FASTEST[m])


def bf16(seconds: float) -> Iterator[Row]:
    """Yield x @ W.T with a weight in bf16 beside our own f32 and torch's bf16."""
    weight = make_weight()
    half = weight.astype(ml_dtypes.bfloat16)
    whole = torch.from_numpy(weight).bfloat16()
    with stored(w=weight, half=half) as tensors:
        for m in ROWS:
            x = make_x(m)
            x_half = x.astype(ml_dtypes.bfloat16)
            given = torch.from_numpy(x).bfloat16()

            def own_f32(x: Array = x) -> object:
                return tensors["w"].matmul(x)

            def peer(given: torch.Tensor = given) -> object:
                return torch.nn.functional.linear(given, whole)

            def ours(x: Array) -> Callable[[], object]:
                return lambda: tensors["half"].matmul(x)

            check("torch", peer(), x_half, half.T, 1e-2)
            for what, used in (("x in bf16", x_half), ("x in f32", x)):
                call = ours(used)
                check("pydedup", call(), used, half.T, 1e-5)
                sides = {"pydedup": call, "pydedup f32": own_f32, "torch bf16": peer}
                targets = {"torch bf16": 1.0}
                if used is x_half and m in OF_OWN_F32:
                    targets["pydedup f32"] = OF_OWN_F32[m]
                yield from rows(f"x @ W.T, bf16, {what}", m, sides, seconds, targets)


def transposed(seconds: float) -> Iterator[Row]:
    """Yield x @ W beside torch and numpy."""
    weight = make_weight()
    whole = torch.from_numpy(weight)
    with stored(w=weight) as tensors:
        ours = tensors["w"]
        for m in ROWS:
            x = make_x(m)
            given = torch.from_numpy(x)
            sides: dict[str, Callable[[], object]] = {
                "pydedup": lambda x=x: ours.matmul(x, transpose=True),  # type: ignore[misc]
                "torch": lambda g=given: g @ whole,  # type: ignore[misc]
                "numpy": lambda x=x: x @ weight,  # type: ignore[misc]
            }
            for name, side in sides.items():
                check(name, side(), x, weight, 1e-5)
            yield from rows("x @ W, f32", m, sides, seconds)


def batches(seconds: float) -> Iterator[Row]:
    """Yield x @ W.T of many rows with small layers beside torch, all in f32 and all in bf16."""
    for outputs, inputs in LAYERS:
        weight = make_weight()[:outputs, :inputs].copy()
        half = weight.astype(ml_dtypes.bfloat16)
        whole = torch.from_numpy(weight)
        with stored(w=weight, half=half) as tensors:
            for m in BATCHES:
                x = make_x(m, inputs)
                kinds = (
                    ("f32", tensors["w"], x, whole, weight, 1e-5),
                    (
                        "bf16",
                        tensors["half"],
                        x.astype(ml_dtypes.bfloat16),
                        whole.bfloat16(),
                        half,
                        1e-2,
                    ),
                )
                for kind, ours, used, theirs, exact, within in kinds:
                    given = torch.from_numpy(x).to(theirs.dtype)
                    sides: dict[str, Callable[[], object]] = {
                        "pydedup": lambda t=ours, x=used, k=kind: t.matmul(x, dtype=k),  # type: ignore[misc]
                        "torch": lambda g=given, w=theirs: torch.nn.functional.linear(g, w),  # type: ignore[misc]
                    }
                    for name, side in sides.items():
                        check(name, side(), used, exact.T, within)
                    what = f"{inputs} to {outputs}, {kind}"
                    yield from rows(what, m, sides, seconds, weights=weight.size)


def avx2(seconds: float) -> Iterator[Row]:
    """Yield the rows of f32 and bf16 beside torch where both may use AVX2 only."""
    asked = [sys.executable, __file__, "--json", "--seconds", str(seconds)]
    done = subprocess.run(
        [*asked, "--only", "f32", "--only", "bf16"],
        env={**os.environ, **ONLY_AVX2},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout)
    assert document["machine"]["kernel"] == "avx2", document["machine"]
    for row in document["rows"]:
        if row["peer"].startswith("torch"):
            yield Row(**{**row, "case": f"AVX2: {row['case']}", "target": 1.0})


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    main(__doc__, [f32, bf16, transposed, batches, avx2], seconds=1.5)
