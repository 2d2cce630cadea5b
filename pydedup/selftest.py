# SPDX-License-Identifier: Apache-2.0
"""``python -m pydedup.selftest``: whether this build, on this machine, does what it must.

Golden vectors that never change (hashes, the bytes of a page), and the main job on a tiny store in
a temporary folder: add, verify, load bit for bit, predict. Every kernel that runs here does all of
it in a process of its own, so that one that crashes is reported like one that is wrong. Needs what
pydedup itself needs, and no test library.

A line per check; the exit status is 0 when all of the expected checks passed, else 1.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pydedup
from pydedup import codec, config
from pydedup.blocks import MatrixView
from pydedup.errors import PydedupError
from pydedup.graph import Graph, Node
from pydedup.hashing import hash_blocks, hash_buffer
from pydedup.types import DType

__all__ = ["CHECKS", "GOLDEN_HASHES", "main"]

_SEEDS = (0, 0x9E3779B97F4A7C15)

#: Length of the input -> digest for each of the seeds, little-endian. Never to be changed.
GOLDEN_HASHES: dict[int, tuple[str, str]] = {
    0: ("71eb5bfa94da1ab9165a31d46a323792", "d99b4549672c40a303f83f23a27c79c5"),
    1: ("ce5307c6cf88b125c9793e9e533d8733", "7d64c33de19fbf2c0df6d29dcd6e8add"),
    3: ("45afefc1366fb300c8bd11976204479a", "6dd36bce51a5d588ff30b69b87cd77d9"),
    8: ("af43834218a5abd8f74d2cb5656be6de", "028b68b7d1cd8f7d62f8a87297fc7cff"),
    16: ("39c14255528aa7c1c21e4ea9cb06d182", "0560fc40ceeac464aaf022f473b41ecb"),
    31: ("ec0d00f828e7cf9254554c5017c7b4e0", "8249ae243b5909dd9e1ce803122d2598"),
    63: ("628053ca7e3a01148f7dfe4aad9b91f5", "e91c92d36acf2046133439a9eb082a05"),
    64: ("59e52be7d1a1ed9e6ed97d8ffe128440", "4e40e1562ad317448df2f22c1f02963b"),
    65: ("1b488519e20de5f0f32fd064a7b03a9a", "c051b2082f647f776c39a5efb7a6488c"),
    129: ("e6977bbfbc3a03051b99fb3a22011bab", "99c07502e3bdb2c5f47e03b930723e4c"),
    256: ("c7cc5447c3269ad960e26cabeb6f0795", "cd60bf62bd0905c5be90a1c123dc2823"),
    1024: ("9850ac60cd49f77bc40d597b71275cee", "6724f11697bf80200c8e4204ffaf7058"),
    1025: ("00504b24dd5a2d30b2f81dfc5cce52f1", "1b108595a0b8af5d7e760b15fe415e03"),
    5000: ("bbac6d25a9cec2845aab955b681d9598", "0458caaef07b0cd2730d4702a186dcbf"),
}
#: Digest over the digests of the blocks of a matrix that no block shape divides.
GOLDEN_BLOCKS = "f59ef7422ab9effaf5423e05138a2d3a"
#: Length and digest of a page of raw blocks.
GOLDEN_RAW_PAGE = (9476, "20f373326e0d410c39b863bcc52453c6")
#: A page of two compressed bf16 blocks, to be read for ever. (How well new ones are compressed
#: may change; so what is written is compared by reading it back.)
GOLDEN_PAGE = (
    "P()Bi0RTV%h(`7^WSG#-e_Tyxzk5Gs0ssI2AOHXWV*&sG000000000000000000000000000000000000R#X53;+"
    "NC6aWAK<^TWyfB*mh0000000000000000R#X53;+NC6aWAK;{X5vfB^si0000000000000000RjO4@Bjb+0ssI2X"
    "8-^I0ssI2X8-^I0RaF2000000000000000fCB&k00000000000000003$IC0000E0000F0000r&E<h-<)AGPNsc|"
    "hOny|Tt-XM!sygAeML^u`^<G$p&!2=nYWG@_zz=?sTjl>-Cn{3|ps`>90{{R30000000000000000{{R30000000"
    "000000005;G3~000gE000gE008PK74)t>7VMi_b>5BO;GVIf(e+Ve*eHa5RgFNJc?GIjS5df~P?awg0MbX4k_J(T"
    "rSF5a>PP?p0000000000000000000000000000000RjO4@Bjb+0ssI2WB>pF0ssI2X8-^I0RaF20000000000000"
    "00fCB&k00000000000000003$IC0000D0000E00015s{xAG?t-JxlPnT&ibFuvTYxxh%o$tEV8b{jSDt95#T$$Mt"
    "vLXTjz)tzM5u;N`koR10RsR400000000000000000RI300000000000000003kCC0000E0000F0002-12nxBlIX0"
    "H%oB=uZ#vmE_@piAa1wLH8vuTLTU7EYEJw>0<z9_$plr6&DCcWgC?;X5N^+n"
)

_TIMEOUT_SECONDS = 120


@dataclass(slots=True)
class _Lab:
    """What checks that follow one another share."""

    folder: Path
    stores: list[pydedup.Store] = field(default_factory=list)

    @property
    def store(self) -> pydedup.Store:
        """The store, opened by the first check that asks for it."""
        if not self.stores:
            self.stores.append(pydedup.open(self.folder / "selftest.db"))
        return self.stores[0]


# ---- material: the same on every machine, whatever numpy's generators do ------------------------


@cache
def _bytes(length: int) -> bytes:
    data, state = bytearray(), 1
    for _ in range(length):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        data.append(state >> 24)
    return bytes(data)


def _matrix(rows: int, cols: int, dtype: DType = DType.F32) -> NDArray[Any]:
    """Return weights of a few bits each, exact in any dtype: they compress, and sums are exact."""
    small = np.frombuffer(_bytes(rows * cols), np.uint8).reshape(rows, cols)
    if dtype is DType.BOOL:
        return small > 127
    values = (small >> 5).astype(np.float32)
    return (values - 4 if dtype.is_float or dtype.label.startswith("int") else values).astype(
        dtype.numpy
    )


def _first_model() -> dict[str, NDArray[Any]]:
    model = {f"all.{dtype.label}": _matrix(9, 7, dtype) for dtype in DType}
    model["odd.weight"] = _matrix(67, 131)
    model["odd.bias"] = _matrix(1, 67)[0]
    model["deep"] = _matrix(6, 60).reshape(6, 3, 4, 5)
    model["scalar"] = np.array(2.5, np.float32)
    model["empty"] = np.empty((0, 5), np.float32)
    model["special"] = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324], np.float64)
    return model


def _second_model() -> dict[str, NDArray[Any]]:
    """Return the first model, one row of one tensor tuned."""
    model = {name: array.copy() for name, array in _first_model().items()}
    model["odd.weight"][3] += 1
    return model


def _graph() -> Graph:
    weights = {"weight": "odd.weight", "bias": "odd.bias"}
    nodes = (Node("linear", ("x",), "h", weights), Node("relu", ("h",), "y"))
    return Graph(inputs=("x",), outputs=("y",), nodes=nodes)


# ---- checks: return what they saw, raise AssertionError with what is wrong ----------------------


def _same(actual: object, wanted: object, what: str) -> None:
    if actual != wanted:
        raise AssertionError(f"{what}: {actual!r} instead of {wanted!r}")


def _same_bits(actual: NDArray[Any], wanted: NDArray[Any], what: str) -> None:
    _same((actual.dtype, actual.shape), (wanted.dtype, wanted.shape), what)
    if actual.tobytes() != wanted.tobytes():
        raise AssertionError(f"{what}: other bits")


def _check_hashes(_: _Lab) -> str:
    for length, digests in GOLDEN_HASHES.items():
        data = _bytes(max(GOLDEN_HASHES))[:length]
        found = tuple(hash_buffer(data, seed=seed).hex() for seed in _SEEDS)
        _same(found, digests, f"hash of {length} bytes")
    return f"{len(_SEEDS) * len(GOLDEN_HASHES)} digests of up to {max(GOLDEN_HASHES)} bytes"


def _block_digest() -> str:
    return hash_buffer(hash_blocks(_matrix(37, 61), (16, 24)).astype("<u8").tobytes()).hex()


def _check_blocks(_: _Lab) -> str:
    _same(_block_digest(), GOLDEN_BLOCKS, "digest of the digests")
    return "9 blocks of a 37x61 matrix"


def _page(view: MatrixView, planes: bool) -> bytes:
    grid = view.grid
    encoded = codec.encode_blocks(view, np.arange(grid.count), planes=planes)
    return codec.build_page(
        encoded.arena,
        encoded.offsets,
        encoded.lengths,
        encoded.encodings,
        np.full(grid.count, view.dtype.code),
        *grid.all_shapes(),
    )


def _read_page(payload: bytes, like: NDArray[Any], block_shape: tuple[int, int]) -> NDArray[Any]:
    """Read a matrix whose blocks are on one page, in order."""
    back = np.zeros_like(like)
    view = MatrixView.of(back, block_shape)
    blocks = np.arange(view.grid.count)
    codec.read_blocks(view, blocks, [codec.Page(payload)], np.zeros_like(blocks), blocks)
    return back


def _check_page_bytes(_: _Lab) -> str:
    written = _page(MatrixView.of(_matrix(37, 61), (16, 24)), planes=False)
    _same((len(written), hash_buffer(written).hex()), GOLDEN_RAW_PAGE, "a page of raw blocks")
    wanted = _matrix(24, 20, DType.BF16)
    _same_bits(_read_page(base64.b85decode(GOLDEN_PAGE), wanted, (12, 20)), wanted, "golden page")
    return "one written, one read, as they were in the first release"


def _check_page_round_trip(_: _Lab) -> str:
    for dtype in DType:
        for planes in (False, True):
            matrix = _matrix(33, 65, dtype)
            view = MatrixView.of(matrix, (16, 32))
            back = _read_page(_page(view, planes), matrix, (16, 32))
            _same_bits(back, matrix, f"{dtype.label} read from a page")
    return f"{len(DType)} dtypes, raw and compressed"


def _check_damage(_: _Lab) -> str:
    page = _page(MatrixView.of(_matrix(20, 20), (10, 10)), True)
    places = range(0, len(page), 97)
    for place in places:
        damaged = bytearray(page)
        damaged[place] ^= 0x10
        try:
            codec.Page(bytes(damaged))
        except PydedupError:
            continue
        raise AssertionError(f"a page with a wrong byte at {place} was accepted")
    return f"{len(places)} damaged pages refused"


def _check_add(lab: _Lab) -> str:
    shape = (16, 32)
    first = lab.store.add("self@1", _first_model(), graph=_graph(), block_shape=shape)
    second = lab.store.add("self@2", _second_model(), graph=_graph(), block_shape=shape)
    _same((first.model, second.model), ("self@1", "self@2"), "addresses")
    fresh = second.blocks - second.shared_blocks
    _same(fresh, 5, "blocks that differ, across 131 columns")
    return f"{first.blocks} blocks, then {fresh} new ones of {second.blocks}"


def _check_verify(lab: _Lab) -> str:
    report = lab.store.verify()
    _same(report.errors, [], "damage")
    _same((report.models, report.notes), (2, []), "models and notes")
    _same(report.blocks, lab.store.stats().distinct_blocks, "blocks on pages")
    return f"{report.pages} pages, {report.blocks} blocks"


def _check_load(lab: _Lab) -> str:
    for address, wanted in (("self@1", _first_model()), ("self", _second_model())):
        loaded = lab.store.load(address)
        _same(list(loaded), list(wanted), f"tensors of {address}")
        for name, array in wanted.items():
            _same_bits(loaded[name], array, f"{name!r} of {address}")
    return f"{len(_first_model())} tensors of each model, bit for bit"


def _check_export(lab: _Lab) -> str:
    path = lab.folder / "self.safetensors"
    lab.store.export("self@1", path)
    report = lab.store.add("again@1", path, block_shape=(16, 32), dry_run=True)
    _same(report.shared_blocks, report.blocks, "blocks that come back from a file")
    return f"{report.blocks} blocks the same in a safetensors file"


def _check_matmul(lab: _Lab) -> str:
    x = _matrix(5, 131)
    tensor = lab.store.tensor("self@2", "odd.weight")
    _same_bits(tensor.matmul(x), x @ _second_model()["odd.weight"].T, "product")
    _same_bits(tensor.take(np.array([66, 3])), _second_model()["odd.weight"][[66, 3]], "rows")
    return "5x131 by 131x67 and two rows, from pages"


def _check_predict(lab: _Lab) -> str:
    x, model = _matrix(4, 131), _second_model()
    wanted = np.maximum(x @ model["odd.weight"].T + model["odd.bias"], 0)
    _same_bits(np.asarray(lab.store.predict("self", x)), wanted, "prediction")
    return "two layers, as numpy has it"


def _check_upkeep(lab: _Lab) -> str:
    lab.store.remove("self@1")
    report = lab.store.vacuum()
    _same(lab.store.verify().errors, [], "damage after vacuum")
    wanted = _second_model()
    for name, array in lab.store.load("self").items():
        _same_bits(array, wanted[name], f"{name!r} after vacuum")
    return f"removed, vacuumed to {report.pages_after} pages, the other model is unharmed"


#: All checks, in order. Each kernel must report every one of them.
CHECKS: dict[str, Callable[[_Lab], str]] = {
    "hash": _check_hashes,
    "block hash": _check_blocks,
    "page bytes": _check_page_bytes,
    "page round trip": _check_page_round_trip,
    "page damage": _check_damage,
    "store add": _check_add,
    "store verify": _check_verify,
    "store load": _check_load,
    "store export": _check_export,
    "store matmul": _check_matmul,
    "store predict": _check_predict,
    "store upkeep": _check_upkeep,
}

# ---- running ------------------------------------------------------------------------------------


def _run_here() -> list[tuple[str, bool, str]]:
    """Run all checks with the kernel of this process; returns (check, passed, what it saw)."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="pydedup-selftest-") as folder:
        lab = _Lab(Path(folder))
        try:
            for name, check in CHECKS.items():
                try:
                    outcomes.append((name, True, check(lab)))
                except Exception as error:
                    text = str(error) if isinstance(error, AssertionError) else repr(error)
                    outcomes.append((name, False, text))
        finally:
            for store in lab.stores:
                store.close()
    return outcomes


def _run_apart(kernel: str) -> list[tuple[str, bool, str]]:
    """Run all checks in a process that demands a kernel."""
    try:
        done = subprocess.run(
            # -P: what is installed, also where this is called from the sources.
            [sys.executable, "-P", "-m", "pydedup.selftest", "--here"],
            env={**os.environ, "PYDEDUP_KERNEL": kernel},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [("process", False, f"did not end within {_TIMEOUT_SECONDS} s")]
    if done.returncode < 0:
        return [("process", False, f"was killed by {signal.Signals(-done.returncode).name}")]
    try:
        document = json.loads(done.stdout)
        outcomes = [
            (str(name), bool(passed), str(seen)) for name, passed, seen in document["checks"]
        ]
        used = document["kernel"]
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        return [("process", False, f"ended with status {done.returncode} and said: {last}")]
    if used != kernel:
        outcomes.append(("process", False, f"used kernel {used}"))
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the self test and return its exit status.

    Parameters
    ----------
    arguments
        By default those of the process. ``--here`` runs the checks once, with the kernel of this
        process, and prints one JSON document.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--here"]:
        outcomes = _run_here()
        print(json.dumps({"kernel": config.kernels().in_use, "checks": outcomes}))
        return 0 if all(passed for _, passed, _ in outcomes) else 1
    if words:
        print("usage: python -m pydedup.selftest", file=sys.stderr)
        return 2
    try:
        kernels = config.kernels()
    except PydedupError as error:
        print(f"FAILED  kernel  {error}")
        return 1
    print(f"pydedup {pydedup.__version__}, Python {sys.version.split()[0]}, numpy {np.__version__}")
    print(f"kernel in use: {kernels.in_use} ({kernels.reason})", flush=True)
    expected = passed = 0
    for kernel in kernels.available:
        if not kernel.runnable:
            print(f"  --      {kernel.name:<8} not run: {kernel.note}", flush=True)
            continue
        expected += len(CHECKS)
        outcomes = _run_apart(kernel.name)
        for name, good, seen in outcomes:
            passed += good and name in CHECKS
            print(
                f"  {'ok' if good else 'FAILED':<7} {kernel.name:<8} {name:<16} {seen}", flush=True
            )
        for name in CHECKS.keys() - {name for name, _, _ in outcomes}:
            print(f"  FAILED  {kernel.name:<8} {name:<16} was not run", flush=True)
    print(f"{passed} of {expected} checks passed")
    return 0 if passed == expected > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
