# SPDX-License-Identifier: Apache-2.0
"""A pass over a large file, tensor by tensor, needs about one tensor of memory, not the file.

Each measurement runs in a child process and looks at the peak of its resident set, which counts
mapped pages of files too: a view of a file is only cheap if its pages go when the array does.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from pydedup.formats.base import Artifact, TensorEntry
from pydedup.formats.onnx import GRAPH
from pydedup.types import DType

TENSORS, ROWS, COLUMNS = 20, 2500, 1000
TENSOR_BYTES = ROWS * COLUMNS * 4
FILE_BYTES = TENSORS * TENSOR_BYTES

#: Reads every element, so that every page is touched. A small file of the same kind comes first,
#: which loads the libraries.
READ = """
import sys
import psutil
from pydedup.formats.registry import open_source

def resident():
    return psutil.Process().memory_info().rss

def read(path):
    total, peak = 0.0, 0
    with open_source(path) as source:
        peak = max(peak, resident())
        for entry in source.entries:
            array = source.read(entry.name)
            total += float(array.sum(dtype="f8"))
            peak = max(peak, resident())
            del array
    return total, peak

read(sys.argv[2])
before = resident()
total, peak = read(sys.argv[1])
print(peak - before, total)
"""

#: Writes from tensors that are made one at a time. Counted is what is not a page of a file: those
#: are the kernel's to drop.
WRITE = """
import pickle, sys, threading
import numpy as np
import psutil
from pydedup.formats.registry import write_model

def private():
    info = psutil.Process().memory_info()
    return info.rss - info.shared

class Made:
    def __init__(self, entries):
        self.shapes = {entry.name: entry.shape for entry in entries}
    def __getitem__(self, name):
        return np.full(self.shapes[name], int(name[1:]), np.float32)

large, small = pickle.load(open(sys.argv[1], "rb"))
write_model(sys.argv[3], Made(small[0]), *small)
before = peak = private()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, private())

watcher = threading.Thread(target=watch)
watcher.start()
write_model(sys.argv[2], Made(large[0]), *large)
done.set()
watcher.join()
print(peak - before)
"""


def model(tensors: int, shape: tuple[int, ...]) -> tuple[list[TensorEntry], list[Artifact]]:
    """Return entries, and the artifact that ONNX needs."""
    entries = [TensorEntry(f"w{index}", DType.F32, shape, index) for index in range(tensors)]
    proto = onnx.ModelProto(ir_version=9, graph=onnx.GraphProto(name="g"))
    for entry in entries:
        proto.graph.initializer.add(name=entry.name, data_type=1, dims=shape)
    return entries, [Artifact(GRAPH, "application/x-onnx", proto.SerializeToString())]


def run(script: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".h5", ".onnx", ""])
def test_writing_and_reading_need_one_tensor(suffix: str, tmp_path: Path) -> None:
    plan, large, small = (tmp_path / name for name in ("plan", f"large{suffix}", f"small{suffix}"))
    plan.write_bytes(pickle.dumps((model(TENSORS, (ROWS, COLUMNS)), model(2, (600, 1000)))))
    (grown,) = run(WRITE, plan, large, small)
    size = sum(path.stat().st_size for path in [large, *large.rglob("*")] if path.is_file())
    assert size > FILE_BYTES
    # The tensor that is written, and the next one while it is made.
    assert TENSOR_BYTES / 4 < int(grown) < 2.5 * TENSOR_BYTES < FILE_BYTES / 5
    grown, total = run(READ, large, small)
    assert float(total) == sum(range(TENSORS)) * ROWS * COLUMNS
    assert int(grown) < 1.25 * TENSOR_BYTES < FILE_BYTES / 10
    assert int(grown) > TENSOR_BYTES / 4  # or nothing was measured


@pytest.mark.parametrize("kind", ["word2vec-binary", "glove"])
def test_opening_word_vectors_needs_no_table(kind: str, tmp_path: Path) -> None:
    rows, columns = (100_000, 200) if kind == "word2vec-binary" else (30_000, 200)
    line = b" 0.25" * columns + b"\n"
    with (tmp_path / "v.bin").open("wb") as file:
        if kind == "word2vec-binary":
            line = b" " + np.full(columns, 0.25, np.float32).tobytes()
            file.write(b"%d %d\n" % (rows, columns))
        for row in range(rows):
            file.write(b"w%d" % row + line)
    (tmp_path / "small.bin").write_bytes(b"2 1\na 1\nb 2\n")
    grown, total = run(READ, tmp_path / "v.bin", tmp_path / "small.bin")
    assert float(total) == rows * columns / 4
    table = rows * columns * 4
    # Reading maps the table once; parsing adds pieces and the vocabulary.
    assert int(grown) < table + (64 << 20)
