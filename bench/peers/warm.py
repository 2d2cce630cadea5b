# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S608 (names of columns are made here)
"""Predictions of dense models that need no disk, beside torch and ONNX Runtime in memory.

    python bench/peers/warm.py [--seconds S] [--only AREA] [--json]

f32, two threads on all sides. ``warm``: the pool holds the model. ``tiny``: a model so small that
what surrounds the products is what takes the time. ``sql``: such a one called for each row by a
function of SQLite, beside functions that call the others. ``small_pool``: it holds a tenth
of it, the rest is in the OS cache, and each call brings in what is missing. ``mixed``: a batch for
twelve variants that have nine tenths of their blocks in common, beside one call after another.
``deltas``: a model whose every weight differs a little from another's, stored as lossless deltas:
with room for what they decode to, and in a pool that the pages of the model just fill.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from _timing import Row, compare, main
from safetensors.numpy import save_file

import pydedup.sql
from pydedup import policies

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "serving"))
import _family

DENSE = _family.Shape(0, 2048, (4096, 4096, 4096, 2048))
TINY = _family.Shape(0, 64, (64, 64, 64, 64))
ROW = _family.Shape(0, 8, (64, 64, 1))
SMALL = _family.Shape(0, 1024, (4096, 4096, 1024))
VARIANTS = 12
SQL_ROWS = 1000


@contextlib.contextmanager
def built(shape: _family.Shape, variants: int, memory: str) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        _family.build(Path(folder), shape, variants)
        with pydedup.open(Path(folder) / "store.db", mode="r", memory=memory) as store:
            yield Path(folder), store


def torch_side(shape: _family.Shape, path: Path) -> Any:
    torch.set_num_threads(2)
    layers: list[torch.nn.Module] = []
    for array in _family.map_file(path).values():
        layer = torch.nn.Linear(array.shape[1], array.shape[0], bias=False)
        layer.weight.data = torch.from_numpy(np.array(array))
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]).eval()


def onnx_side(module: Any, features: int, folder: Path) -> Any:
    path = folder / "m.onnx"
    with torch.inference_mode():
        torch.onnx.export(
            module,
            (torch.zeros(1, features),),
            path,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
            dynamo=False,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _rows(
    memory: str,
    batches: dict[int, dict[str, float]],
    seconds: float,
    shape: _family.Shape = DENSE,
    unit: str = "ms",
) -> Iterator[Row]:
    with built(shape, 1, memory) as (folder, store), torch.inference_mode():
        module = torch_side(shape, folder / "v0.safetensors")
        session = onnx_side(module, shape.cols, folder)
        rng = np.random.default_rng(0)
        for batch, target in batches.items():
            x = rng.standard_normal((batch, shape.cols), np.float32)
            tensor = torch.from_numpy(x)
            np.testing.assert_allclose(
                store.predict("v0", x), module(tensor).numpy(), rtol=1e-3, atol=1e-4
            )
            yield from compare(
                f"batch {batch}, pool of {memory}, model of {shape.nbytes >> 10:,} KiB",
                unit=unit,
                sides={
                    "pydedup": lambda x=x: store.predict("v0", x),  # type: ignore[misc]
                    "torch": lambda t=tensor: module(t),  # type: ignore[misc]
                    "ONNX Runtime": lambda x=x: session.run(None, {"x": x}),  # type: ignore[misc]
                },
                seconds=seconds,
                target=target,
                settle=True,
            )


def warm(seconds: float) -> Iterator[Row]:
    wanted = {"torch": 1.2, "ONNX Runtime": 1.0}
    yield from _rows("2GiB", {1: {}, 8: wanted, 32: wanted, 128: wanted}, seconds)


def tiny(seconds: float) -> Iterator[Row]:
    yield from _rows("64MiB", {1: {}, 32: {}}, seconds, TINY, "us")


def sql(seconds: float) -> Iterator[Row]:
    with built(ROW, 1, "64MiB") as (folder, _), torch.inference_mode():
        module = torch_side(ROW, folder / "v0.safetensors")
        session = onnx_side(module, ROW.cols, folder)
        connection = sqlite3.connect(folder / "store.db")
        columns = [f"f{number}" for number in range(ROW.cols)]
        connection.execute(f"CREATE TABLE t ({', '.join(columns)})")
        rows = np.random.default_rng(0).random((SQL_ROWS, ROW.cols)).tolist()
        connection.executemany(f"INSERT INTO t VALUES ({', '.join('?' * ROW.cols)})", rows)
        connection.commit()
        pydedup.sql.register(connection)
        peers: dict[str, Any] = {
            "torch": lambda *row: module(torch.tensor([row])).item(),
            "ONNX Runtime": lambda *row: float(
                session.run(None, {"x": np.array([row], np.float32)})[0][0, 0]
            ),
        }
        queries = {"pydedup": f"SELECT pydedup_predict('v0', {', '.join(columns)}) FROM t"}
        for number, (name, peer) in enumerate(peers.items()):
            connection.create_function(f"peer{number}", ROW.cols, peer)
            queries[name] = f"SELECT peer{number}({', '.join(columns)}) FROM t"
        found = [connection.execute(query).fetchall() for query in queries.values()]
        for others in found[1:]:
            np.testing.assert_allclose(found[0], others, rtol=1e-3, atol=1e-4)
        yield from compare(
            f"a function of SQLite, row by row, {ROW.nbytes >> 10} KiB",
            unit="k/s",
            work=SQL_ROWS,
            sides={
                name: lambda q=query: connection.execute(q).fetchall()  # type: ignore[misc]
                for name, query in queries.items()
            },
            seconds=seconds,
            settle=True,
        )
        connection.close()


def small_pool(seconds: float) -> Iterator[Row]:
    memory = f"{DENSE.nbytes // 10 + (48 << 20)}B"  # 48 MiB of a budget are scratch, not pool
    yield from _rows(memory, {32: {"torch": 1.0}, 128: {"torch": 1.0}}, seconds)


def deltas(seconds: float) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    base = _family.weights(SMALL, 0)
    near = {
        name: array + rng.standard_normal(array.shape, np.float32) * np.float32(0.0002)
        for name, array in base.items()
    }
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        with pydedup.open(Path(folder) / "store.db") as store:
            store.add("base", base, policy=policies.Exact())
            report = store.add("near", near, graph=_family.graph_of(SMALL))
        save_file(near, Path(folder) / "near.safetensors")
        module = torch_side(SMALL, Path(folder) / "near.safetensors")
        # 48 MiB of a budget are scratch; a delta needs its base, too.
        full = SMALL.nbytes + report.stored_bytes + (56 << 20)
        for memory in ("1GiB", f"{full}B"):
            with pydedup.open(Path(folder) / "store.db", mode="r", memory=memory) as store:
                for batch in (1, 8, 32, 128):
                    x = rng.standard_normal((batch, SMALL.cols), np.float32)
                    tensor = torch.from_numpy(x)
                    expected = module(tensor).numpy()
                    np.testing.assert_allclose(
                        store.predict("near", x), expected, rtol=1e-3, atol=1e-4
                    )
                    yield from compare(
                        f"deltas, batch {batch}, memory {memory}",
                        unit="ms",
                        sides={
                            "pydedup": lambda x=x: store.predict("near", x),  # type: ignore[misc]
                            "torch": lambda t=tensor: module(t),  # type: ignore[misc]
                        },
                        seconds=seconds,
                        settle=True,
                    )


def mixed(seconds: float) -> Iterator[Row]:
    with built(SMALL, VARIANTS + 1, "2GiB") as (_, store):
        rng = np.random.default_rng(0)
        for rows in (1, 2, 4, 8):
            requests = [
                (f"v{1 + i}", rng.standard_normal((rows, SMALL.cols), np.float32))
                for i in range(VARIANTS)
            ]
            together = store.predict_many(requests)
            for (name, x), y in zip(requests, together, strict=True):
                np.testing.assert_allclose(y, store.predict(name, x), rtol=1e-3, atol=1e-4)
            yield from compare(
                f"{VARIANTS} variants, {rows} rows each",
                unit="ms",
                sides={
                    "pydedup": lambda r=requests: store.predict_many(r),  # type: ignore[misc]
                    "one by one": lambda r=requests: [  # type: ignore[misc]
                        store.predict(name, x) for name, x in r
                    ],
                },
                seconds=seconds,
                target=3.0 if rows == 1 else None,
                settle=True,
            )


if __name__ == "__main__":
    main(__doc__, [warm, tiny, sql, small_pool, deltas, mixed])
