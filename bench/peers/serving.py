# SPDX-License-Identifier: Apache-2.0
"""Serving under a memory limit that is really kept, beside every file-based way to do it.

Each side runs in a child process inside a memory cgroup of its own (v1 or v2; needs root), with the
pages of all files out of the OS cache at first: what a side keeps in that cache counts against its
limit. A side that is killed is recorded as that.

    python bench/peers/serving.py --folder DIR [--only variants,dense] [--requests 60]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "serving"))
import _family  # noqa: E402

MIB = 1 << 20
SERVE_ONE = HERE.parent / "serving" / "serve_one.py"
#: 400 MB of embeddings, 104 MB of dense layers.
VARIANTS = _family.Shape(400_000, 256, (4096, 4096, 2048))
#: 492 MB of embeddings, 8 MB of dense layers.
FIRST = _family.Shape(480_000, 256, (2048, 512, 256, 16))
#: 1 GiB of dense layers.
DENSE = _family.Shape(0, 4096, (4096,) * 16)
FILE_SIDES = ["numpy.memmap", "safetensors", "torch.load(mmap)", "ONNX Runtime", "reload"]


class Cgroup:
    """A memory cgroup that a child enters before it begins."""

    def __init__(self, limit: int) -> None:
        base = Path("/sys/fs/cgroup/memory")
        self._is_v1 = base.is_dir()
        self.path = (
            base if self._is_v1 else Path("/sys/fs/cgroup")
        ) / f"pydedup-{uuid.uuid4().hex}"
        self.path.mkdir()
        name = "memory.limit_in_bytes" if self._is_v1 else "memory.max"
        (self.path / name).write_text(str(limit))
        if not self._is_v1:
            (self.path / "memory.swap.max").write_text("0")

    def enter(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        name = "memory.max_usage_in_bytes" if self._is_v1 else "memory.peak"
        return int((self.path / name).read_text())

    def close(self) -> None:
        self.path.rmdir()


def run(side: str, folder: Path, limit: int, *arguments: str) -> dict[str, Any]:
    """Run one side and return what it measured, or how it ended."""
    _family.drop_from_cache(folder)
    group = Cgroup(limit)
    try:
        done = subprocess.run(
            [sys.executable, str(SERVE_ONE), side, str(folder), *arguments],
            capture_output=True,
            text=True,
            preexec_fn=group.enter,
            timeout=900,
        )
        peak = group.peak()
    except subprocess.TimeoutExpired:
        return {"died": "took more than 900 s"}
    finally:
        group.close()
    if done.returncode:
        killed = done.returncode == -signal.SIGKILL
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        return {"died": "killed for its memory" if killed else last[:90]}
    return {**json.loads(done.stdout), "peak": peak}


def table_of(title: str, rows: dict[str, dict[str, Any]], ours: str = "pydedup") -> Table:
    table = Table(title=title)
    for name in ("side", "median ms", "p99 ms", "disk MB/request", "anon MB", "median / ours"):
        table.add_column(name, justify="left" if name == "side" else "right")
    mine = float(np.median(rows[ours]["times"])) if "times" in rows[ours] else float("nan")
    for side, row in rows.items():
        if "died" in row:
            table.add_row(side, row["died"], "", "", "", "")
            continue
        times = np.array(row["times"]) * 1e3
        table.add_row(
            side,
            f"{np.median(times):.1f}",
            f"{np.quantile(times, 0.99):.1f}",
            f"{row['read_bytes'] / 1e6 / row['requests']:.1f}",
            f"{row['anon_bytes'] / 1e6:.0f}",
            f"{np.median(times) / 1e3 / mine:.2f}",
        )
    return table


def write_onnx(folder: Path, shape: _family.Shape, variants: int) -> None:
    """Write graphs whose weights are pieces of the safetensors files."""
    import onnx
    from onnx import TensorProto, helper

    for variant in range(variants):
        tensors = []
        for name, (offset, dims) in _family.offsets(folder / f"v{variant}.safetensors").items():
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", f"v{variant}.safetensors"),
                ("offset", str(offset)),
                ("length", str(4 * int(np.prod(dims)))),
            ):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, value
            tensors.append(tensor)
        nodes, value = [], "x"
        if shape.rows:
            nodes.append(helper.make_node("Gather", ["table", "x"], ["rows"]))
            nodes.append(helper.make_node("ReduceMean", ["rows"], ["bag"], axes=[1], keepdims=0))
            value = "bag"
        for i in range(len(shape.widths)):
            nodes.append(helper.make_node("Gemm", [value, f"dense{i:02}"], [f"h{i}"], transB=1))
            value = f"h{i}"
            if i + 1 < len(shape.widths):
                nodes.append(helper.make_node("Relu", [value], [f"r{i}"]))
                value = f"r{i}"
        kind = TensorProto.INT64 if shape.rows else TensorProto.FLOAT
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", kind, [None, None])],
            [helper.make_tensor_value_info(value, TensorProto.FLOAT, [None, None])],
            tensors,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
        model.ir_version = 8
        onnx.save(model, folder / f"v{variant}.onnx")


def requests_file(variants: list[int]) -> str:
    descriptor, name = tempfile.mkstemp(suffix=".json")
    with os.fdopen(descriptor, "w") as file:
        json.dump(variants, file)
    return name


def variants_case(folder: Path, count: int, sides: list[str]) -> list[Table]:
    folder = folder / "variants"
    _family.build(folder, VARIANTS, 12, pt="torch.load(mmap)" in sides)
    write_onnx(folder, VARIANTS, 12)
    limit = VARIANTS.nbytes * 3 // 2
    rng = np.random.default_rng(8)
    zipf = 1 / np.arange(1, 13)
    tables = []
    for traffic, chances in (("Zipf", zipf / zipf.sum()), ("uniform", np.full(12, 1 / 12))):
        asked = requests_file(rng.choice(12, count, p=chances).tolist())
        rows = {
            side: run(
                side,
                folder,
                limit,
                *("--memory", str(limit - 150 * MIB), "--requests", asked, "--rows", "32"),
                *("--ids", "128", "--size", str(VARIANTS.rows), "--warm-up", str(count // 4)),
            )
            for side in sides
        }
        check_same(rows)
        tables.append(
            table_of(
                f"12 variants of {VARIANTS.nbytes / 1e6:.0f} MB, {traffic}, limit "
                f"{limit / 1e6:.0f} MB, 32 x 128 ids",
                rows,
            )
        )
        Console(width=140).print(tables[-1], rows["pydedup"].get("stats"))
    return tables


def dense_case(folder: Path, count: int, sides: list[str]) -> list[Table]:
    folder = folder / "dense"
    _family.build(folder, DENSE, 1, pt="torch.load(mmap)" in sides)
    write_onnx(folder, DENSE, 1)
    limit = DENSE.nbytes // 2
    tables = []
    for rows_of_x in (1, 128):
        asked = requests_file([0] * max(count // 4, 6))
        rows: dict[str, dict[str, Any]] = {
            side: run(
                side,
                folder,
                limit,
                *("--memory", str(limit - 150 * MIB), "--requests", asked),
                *("--rows", str(rows_of_x), "--size", "4096", "--warm-up", "2"),
            )
            for side in sides
            if side != "reload"
        }
        check_same(rows)
        tables.append(
            table_of(
                f"one dense model of {DENSE.nbytes / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB, "
                f"batch {rows_of_x}",
                rows,
            )
        )
        Console(width=140).print(tables[-1], rows["pydedup"].get("stats"))
        if "times" not in rows["pydedup"]:
            continue
        # The bound: the larger of the model's bytes from the disk once and compute alone.
        disk = disk_seconds(folder / "v0.safetensors")
        alone = run(
            "pydedup",
            folder,
            64 << 30,
            *("--memory", "4GiB", "--requests", asked),
            *("--rows", str(rows_of_x), "--size", "4096", "--warm-up", "2"),
        )
        compute = float(np.median(alone["times"]))
        ratio = float(np.median(rows["pydedup"]["times"])) / max(disk, compute)
        print(
            f"its bytes from the disk once: {disk * 1e3:.0f} ms, compute alone: "
            f"{compute * 1e3:.0f} ms; pydedup takes {ratio:.2f} of the larger (aim: at most 1.2)"
        )
    return tables


def disk_seconds(path: Path) -> float:
    """Return how long a file takes from the disk in one stream, the median of three times."""
    seconds = []
    buffer = bytearray(8 * MIB)
    for _ in range(3):
        _family.drop_from_cache(path.parent)
        began = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def first_case(folder: Path, count: int, sides: list[str]) -> list[Table]:
    """From the start of a process to its first answer; no limit, files not in the OS cache."""
    folder = folder / "first"
    _family.build(folder, FIRST, 1, pt="torch.load(mmap)" in sides)
    write_onnx(folder, FIRST, 1)
    asked = requests_file([0])
    rows: dict[str, dict[str, Any]] = {}
    for side in sides:
        seconds = []
        for _ in range(max(count // 10, 5)):
            began = time.time()
            row = run(
                side,
                folder,
                64 << 30,
                *("--memory", "1GiB", "--requests", asked, "--rows", "1", "--ids", "128"),
                *("--size", str(FIRST.rows)),
            )
            if "died" in row:
                break
            seconds.append(row["answered_at"] - began)
        rows[side] = row if "died" in row else {**row, "times": seconds}
    check_same(rows)
    title = f"start of the process to the first answer, {FIRST.nbytes / 1e6:.0f} MB, 128 ids"
    tables = [table_of(title, rows)]
    Console(width=140).print(tables[-1])
    return tables


def memory_case(folder: Path, count: int, sides: list[str]) -> list[Table]:
    """Resident memory as more variants are served; no limit, no budget in the way."""
    folder = folder / "variants"
    _family.build(folder, VARIANTS, 12, pt="torch.load(mmap)" in sides)
    write_onnx(folder, VARIANTS, 12)
    table = Table(title="memory for N variants, all of them asked (anonymous and mapped, MB)")
    table.add_column("side")
    for variants in (1, 4, 12):
        table.add_column(str(variants), justify="right")
    for side in sides:
        cells = []
        for variants in (1, 4, 12):
            asked = requests_file(list(range(variants)) * 3)
            row = run(
                side,
                folder,
                64 << 30,
                *("--memory", "8GiB", "--requests", asked, "--rows", "32", "--ids", "128"),
                *("--size", str(VARIANTS.rows)),
            )
            cells.append(row.get("died") or f"{row['resident_bytes'] / 1e6:.0f}")
        table.add_row(side, *cells)
    Console(width=140).print(table)
    return [table]


def check_same(rows: dict[str, dict[str, Any]]) -> None:
    """All sides must have predicted the same."""
    checks = {side: row["check"] for side, row in rows.items() if "check" in row}
    first = next(iter(checks.values()))
    for side, check in checks.items():
        np.testing.assert_allclose(check, first, rtol=1e-3, err_msg=side)


CASES = {
    "variants": variants_case,
    "dense": dense_case,
    "first": first_case,
    "memory": memory_case,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="some 13 GB are written there")
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--sides", default=",".join(["pydedup", *FILE_SIDES]))
    parser.add_argument("--requests", type=int, default=60)
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("memory cgroups need root")
    sides = options.sides.split(",")
    for case in options.only.split(","):
        CASES[case](options.folder, options.requests, sides)


if __name__ == "__main__":
    main()
