# SPDX-License-Identifier: Apache-2.0
"""Threads that are inside the core when the interpreter ends: daemon threads of a server, say.

And interpreters that the core is not for.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

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
