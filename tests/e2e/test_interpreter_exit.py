# SPDX-License-Identifier: Apache-2.0
"""Threads that are inside the core when the interpreter ends: daemon threads of a server, say.

And interpreters that the core is not for.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import pydedup

_CALLS = {
    "hashes": "hash_blocks(matrix, (64, 64))",
    "index": """L2LSH((64, 64), np.float32).add_matrix(matrix, range(256))""",
    "magnitudes": "magnitude(matrix, (64, 64))",
    "packing": "pack([range(20_000), range(10_000, 40_000)], 100)",
    "small": "hash_buffer(matrix[:64])",
}

_CODE = """
import sys
import threading
import time
import numpy as np
from pydedup.hashing import hash_blocks, hash_buffer
from pydedup.packing import pack
from pydedup.similarity import L2LSH, magnitude

matrix = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
began = threading.Semaphore(0)

def work():
    {call}
    began.release()
    while True:
        {call}

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
for _ in range(3):
    began.acquire()
"""


@pytest.mark.parametrize("what", _CALLS)
def test_daemon_threads_in_the_core_end_with_the_process(what: str) -> None:
    """Python ends a thread that asks for the GIL by unwinding it, and the process was aborted."""
    code = textwrap.dedent(_CODE).replace("{call}", _CALLS[what])
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


_INTERRUPTED = """
import sys
import threading
import pydedup

start = threading.Thread.start

def interrupted(thread):
    start(thread)
    if thread.name.startswith("pydedup-reader"):
        raise KeyboardInterrupt

threading.Thread.start = interrupted
store = pydedup.open(sys.argv[1], mode="r")
store.load("m")
"""


def test_ctrl_c_while_a_reader_begins_ends_the_process(tmp_path: Path) -> None:
    """Python waited for that thread for ever: an export under load, once in seven times."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with pydedup.open(url) as store:
        store.add("m", {"w": np.random.default_rng(0).standard_normal((3000, 1000), np.float32)})
    words = [sys.executable, "-c", _INTERRUPTED, url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in done.stderr


_ATTACHED = """
import sys
import pydedup
import torch

net = torch.nn.Sequential(torch.nn.Embedding(900, 64)).eval()
store = pydedup.open(sys.argv[1])
store.add("m", net)
store.attach(net, "m")
net(torch.tensor([5]))
"""


def test_a_module_that_stays_attached_is_left_without_a_word(tmp_path: Path) -> None:
    """What cleans up after a block map asked its own module for a table, which was gone by then."""
    words = [sys.executable, "-c", _ATTACHED, str(tmp_path / "store.db")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="Python itself asks the module, from 3.12 on"
)
def test_a_sub_interpreter_is_refused() -> None:
    """The import waited there for ever."""
    code = (
        "import _xxsubinterpreters as interpreters\n"
        "interpreters.run_string(interpreters.create(), 'import pydedup.store')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ImportError'>: pydedup cannot be used in a sub-interpreter; use the main" in done.stderr
