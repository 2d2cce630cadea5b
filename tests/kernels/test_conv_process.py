# SPDX-License-Identifier: Apache-2.0
"""Convolutions beside what else a process has: threads that want the GIL, and memory that ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pydedup.testing.kernels import RUNNABLE, run_with_kernel

_MADE = """
import sys, threading
import ml_dtypes, numpy as np
from pydedup import _core
from pydedup.types import DType

x = np.ones((1, 64, 128, 128), ml_dtypes.bfloat16)
y = np.zeros((1, 64, 128, 128), np.uint16)
how = None, "none", y, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1
sys.setswitchinterval(1000)  # another thread runs when the GIL is given away, and not before

def make(image, begins, here, made):
    begins.set()
    while len(made) < 2000 and not here.is_set():
        made.append(_core.Conv2d(64, 64, 64, 64, DType.BF16.code, image, *how).fed)

for image in (x.view(np.uint16), x.astype(np.float32)):
    given = image, threading.Event(), threading.Event(), []
    thread = threading.Thread(target=make, args=given)
    thread.start()
    given[1].wait()
    given[2].set()
    thread.join()
    print(len(given[3]) < 2000)
"""


@pytest.mark.parametrize("kernel", ["avx512bf16", "amx"])
def test_an_image_is_looked_through_without_the_gil(kernel: str) -> None:
    """One of 270 MB kept all other threads for 60 ms."""
    if kernel not in RUNNABLE:
        pytest.skip("no other kernel multiplies bf16 numbers, and looks for them")
    assert run_with_kernel(kernel, _MADE) == "True\nTrue\n"


_NO_ROOM = """
import resource, sys
from pathlib import Path
import ml_dtypes, numpy as np
from pydedup import conv
from pydedup.errors import BudgetError
from pydedup.testing.memory_pages import MemoryPages
from pydedup.types import DType

groups = int(sys.argv[1])
pages = MemoryPages()
w = np.random.default_rng(0).standard_normal((8, 64 // groups, 3, 3)).astype(ml_dtypes.bfloat16)
block_map = pages.add(w, (8, 4))
pool = pages.pool(4 * max(map(len, pages.payloads.values())))  # few blocks at a time
x = np.zeros((1, 64, 2048, 1024), ml_dtypes.bfloat16)
how = {"kernel": 3, "padding": 1, "groups": groups, "dtype": DType.BF16}
conv.conv2d(block_map, pool, x[:, :, :200, :200], threads=2, **how)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
result = 8 * 2048 * 1024 * 2
limit = taken + result + (20 << 20)  # sums take twice as much
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    conv.conv2d(block_map, pool, x, **how)
except BudgetError as error:
    print(error)
"""


@pytest.mark.parametrize("groups", [1, 8])
def test_no_memory_for_sums_beside_a_result_in_bf16_is_told(groups: int) -> None:
    """It was a MemoryError of C++, "std::bad_alloc"."""
    words = [sys.executable, "-P", "-c", _NO_ROOM, str(groups)]
    done = subprocess.run(words, capture_output=True, text=True)
    said = "no memory for what a product needs beside x and its result\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
