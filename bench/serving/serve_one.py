# SPDX-License-Identifier: Apache-2.0
"""One side of a serving benchmark, in a process of its own: serves requests, prints JSON.

Run by bench/peers/serving.py, inside a memory cgroup where the case has one. What a side imports is
its own: it counts against the limit, as it would for a user.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _family

Serve = Callable[[int, NDArray[Any]], Any]
Side = tuple[Serve, Callable[[], Any]]


def forward(tensors: Any, x: NDArray[Any]) -> NDArray[Any]:
    """Numpy: rows of the table averaged, then dense layers."""
    if "table" in tensors:
        x = np.asarray(tensors["table"][x.reshape(-1)]).reshape(*x.shape, -1).mean(axis=1)
    layers = sorted(name for name in tensors if name.startswith("dense"))
    for name in layers:
        x = x @ tensors[name].T
        if name != layers[-1]:
            np.maximum(x, 0, out=x)
    return x


def torch_forward(tensors: Any, x: NDArray[Any]) -> Any:
    import torch

    with torch.inference_mode():
        value = torch.from_numpy(x)
        if "table" in tensors:
            value = torch.nn.functional.embedding_bag(value, tensors["table"], mode="mean")
        layers = sorted(name for name in tensors if name.startswith("dense"))
        for name in layers:
            value = torch.nn.functional.linear(value, tensors[name])
            if name != layers[-1]:
                value = torch.relu_(value)
        return value.numpy()


def of_pydedup(folder: Path, memory: str) -> Side:
    import pydedup

    store = pydedup.open(folder / "store.db", mode="r", memory=memory)
    return lambda variant, x: store.predict(f"v{variant}", x), lambda: store.stats().pool


def of_memmap(folder: Path, memory: str) -> Side:
    mapped: dict[int, Any] = {}

    def serve(variant: int, x: NDArray[Any]) -> Any:
        if variant not in mapped:
            mapped[variant] = _family.map_file(folder / f"v{variant}.safetensors")
        return forward(mapped[variant], x)

    return serve, dict


def of_torch_mmap(folder: Path, memory: str) -> Side:
    import torch

    torch.set_num_threads(2)
    mapped: dict[int, Any] = {}

    def serve(variant: int, x: NDArray[Any]) -> Any:
        if variant not in mapped:
            path = folder / f"v{variant}.pt"
            mapped[variant] = torch.load(path, mmap=True, weights_only=True)
        return torch_forward(mapped[variant], x)

    return serve, dict


def of_safetensors(folder: Path, memory: str) -> Side:
    """Mapped by the library, tensors taken as views of torch."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(2)
    opened: dict[int, Any] = {}

    def serve(variant: int, x: NDArray[Any]) -> Any:
        if variant not in opened:
            file = safe_open(folder / f"v{variant}.safetensors", "pt")
            opened[variant] = {name: file.get_tensor(name) for name in list(file.keys())}
        return torch_forward(opened[variant], x)

    return serve, dict


def of_reload(folder: Path, memory: str) -> Side:
    """Whole models in memory, one at a time: the one used last stays."""
    loaded: dict[int, Any] = {}

    def serve(variant: int, x: NDArray[Any]) -> Any:
        if variant not in loaded:
            loaded.clear()
            path = folder / f"v{variant}.safetensors"
            loaded[variant] = {
                name: np.fromfile(path, np.float32, int(np.prod(shape)), offset=offset).reshape(
                    shape
                )
                for name, (offset, shape) in _family.offsets(path).items()
            }
        return forward(loaded[variant], x)

    return serve, dict


def of_onnxruntime(folder: Path, memory: str) -> Side:
    """A session per variant, weights as external data that the runtime maps."""
    import onnxruntime

    sessions: dict[int, Any] = {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    # Weights in another order for its kernels would be copies of all of them.
    options.add_session_config_entry("session.disable_prepacking", "1")

    def serve(variant: int, x: NDArray[Any]) -> Any:
        if variant not in sessions:
            path = folder / f"v{variant}.onnx"
            sessions[variant] = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        session = sessions[variant]
        return session.run(None, {session.get_inputs()[0].name: x})[0]

    return serve, dict


SIDES = {
    "pydedup": of_pydedup,
    "numpy.memmap": of_memmap,
    "torch.load(mmap)": of_torch_mmap,
    "safetensors": of_safetensors,
    "reload": of_reload,
    "ONNX Runtime": of_onnxruntime,
}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _read_bytes() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--requests", type=Path, required=True, help="JSON: list of variants")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--ids", type=int, default=0, help="per row; 0 for dense inputs")
    parser.add_argument("--size", type=int, required=True, help="rows of the table, or features")
    parser.add_argument("--warm-up", type=int, default=0)
    options = parser.parse_args()
    serve, stats = SIDES[options.side](options.folder, options.memory)
    imported = _status("RssAnon")
    rng = np.random.default_rng(3)
    times, most, check, answered_at = [], 0, [], 0.0
    read0 = _read_bytes()
    for number, variant in enumerate(json.loads(options.requests.read_text())):
        if options.ids:
            x: NDArray[Any] = rng.integers(0, options.size, (options.rows, options.ids))
        else:
            x = rng.standard_normal((options.rows, options.size), np.float32)
        began = time.perf_counter()
        y = serve(variant, x)
        spent = time.perf_counter() - began
        answered_at = answered_at or time.time()
        most = max(most, _status("RssAnon"))
        if number < 3:
            check.append(float(np.abs(np.asarray(y, np.float64)).sum()))
        if number >= options.warm_up:
            times.append(spent)
    json.dump(
        {
            "times": times,
            "read_bytes": _read_bytes() - read0,
            "requests": number + 1,
            "imported_bytes": imported,
            "answered_at": answered_at,
            "resident_bytes": _status("VmRSS"),
            "anon_bytes": most,
            "check": check,
            "stats": stats(),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
