# SPDX-License-Identifier: Apache-2.0
"""Arrays that another thread changes while the core, without the GIL, works on them; and products.

The core checks ids and offsets once and then relies on them. What a call makes of such an array is
anybody's guess; that it neither crashes nor hangs nor leaves anything broken behind is not.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

# `meanwhile(call, change)`: `change` runs some time after `call`, on a thread of its own, gave the
# GIL away, since until then nobody else is given it.
_PREAMBLE = """
import sys
import threading
import time
import numpy as np
from pydedup.errors import ArgumentError

sys.setswitchinterval(1000)

def meanwhile(call, change, after=0):
    begins = threading.Event()
    def run():
        begins.set()
        try:
            call()
        except ArgumentError:
            pass
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    begins.wait()
    time.sleep(after)
    change()
    thread.join(60)
    assert not thread.is_alive(), "it hangs"
"""

_CASES = {
    "an index forgets": """
        from pydedup.similarity import L2LSH
        n = 100_000
        one = np.ones((1, 4, 4), np.float32)
        for milliseconds in (0, 5, 10, 20, 40):
            index = L2LSH((4, 4), np.float32)
            index.add(np.broadcast_to(one, (n, 4, 4)), np.arange(n))
            ids = np.random.default_rng(0).permutation(n)
            meanwhile(lambda: index.remove(ids), lambda: ids.fill(2**40), milliseconds / 1000)
            assert len(index) == 0
            index.add(one, [7])
            assert index.query(one)[0].tolist() == [[7]]
        """,
    "an index learns": """
        from pydedup.similarity import L2LSH
        n = 100_000
        blocks = np.random.default_rng(0).standard_normal((n, 4, 4), np.float32)
        index = L2LSH((4, 4), np.float32)
        ids = np.arange(n)
        meanwhile(lambda: index.add(blocks, ids), lambda: ids.fill(-5))
        assert index.ids.tolist() == list(range(n))
        copies = []
        meanwhile(lambda: copies.append(index.select(np.arange(n), ids)), lambda: ids.fill(-5))
        ids[:] = np.arange(n)
        meanwhile(lambda: copies.append(index.select(np.arange(n), ids)), lambda: ids.fill(-5))
        # Whether the change came before the call took its copy is chance; half of it is wrong.
        copies.append(index.select(np.arange(n), np.arange(n)))
        assert {tuple(copy.ids.tolist()) for copy in copies} == {tuple(range(n))}
        index.remove(np.arange(n))
        assert len(index) == 0
        """,
    "packing": """
        from pydedup.packing import pack
        n = 500_000
        ids = np.arange(n)
        indptr = np.array([0, n])
        for other in (2**40, -1, n + 2**21):
            for change in (lambda: ids.fill(other), lambda: indptr.fill(other)):
                for milliseconds in (0, 1, 2, 4, 10):
                    ids[:] = np.arange(n)
                    indptr[:] = 0, n
                    meanwhile(lambda: pack((indptr, ids), 10), change, milliseconds / 1000)
        ids[:] = np.arange(n)
        indptr[:] = 0, n
        assert len(pack((indptr, ids), 10).pages) == n // 10
        """,
    "rows of an embedding": """
        import pydedup
        table = np.random.default_rng(0).standard_normal((1000, 64), np.float32)
        with pydedup.open("sqlite:///" + sys.argv[1]) as store:
            store.add("m", {"w": table})
            t = store.tensor("m", "w")
            ids = np.arange(1_000_000) % 1000
            t.take(ids[:8])
            for other in (2**40, -(2**40)):
                ids[:] = np.arange(1_000_000) % 1000
                out = []
                meanwhile(lambda: out.append(t.take(ids)), lambda: ids.fill(other))
                assert np.array_equal(out[0][-1000:], table)
                ids[:] = np.arange(1_000_000) % 1000
                meanwhile(lambda: t.bag(ids.reshape(-1, 4), None, "sum"), lambda: ids.fill(other))
        """,
    "a product that two threads feed": """
        from pydedup import _core, codec
        from pydedup.blocks import MatrixView
        n, code = 2048, 2
        view = MatrixView.of(np.zeros((n, n), np.float32), (64, 64))
        count = view.grid.count
        blocks = codec.encode_blocks(view, np.arange(count), planes=False)
        columns = blocks.arena, blocks.offsets, blocks.lengths, blocks.encodings
        sizes = [np.full(count, number) for number in (code, 64, 64)]
        page = codec.Page(codec.build_page(*columns, *sizes))
        x, y = np.ones((64, n), np.float32), np.zeros((64, n), np.float32)
        image, maps = x[:1].reshape(1, n, 1, 1), y[:1].reshape(1, n, 1, 1)
        window = np.zeros(64, np.uint32), np.arange(64, dtype=np.uint32)
        def feed(product):
            for _ in range(16):
                try:
                    product.feed([page], *window)
                except ArgumentError:
                    pass
        for _ in range(20):
            for product in (
                _core.Matmul(n, n, 64, 64, code, x, None, "none", False, y),
                _core.Matmul(n, n, 64, 64, code, x, None, "none", True, y),
                _core.Conv2d(
                    n, n, 64, 64, code, image, None, "none", maps,
                    (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1,
                ),
            ):
                meanwhile(lambda: feed(product), lambda: feed(product))
        """,
    "encoding": """
        from pydedup import codec
        from pydedup.blocks import MatrixView
        n = 20_000
        matrix = np.random.default_rng(0).standard_normal((n, 64), np.float32)
        view = MatrixView.of(matrix, (1, 64))
        indices = np.arange(n)
        limits = np.full(n, 1)
        for change in (lambda: indices.fill(2**40), lambda: limits.fill(255)):
            for call in (
                lambda: codec.encode_blocks(view, indices, planes=True),
                lambda: codec.encode_deltas(view, indices, view, indices, limits=limits),
                lambda: codec.estimate_deltas(view, indices, view, indices),
            ):
                for milliseconds in (0, 1, 2, 5):
                    indices[:] = np.arange(n)
                    limits[:] = 1
                    meanwhile(call, change, milliseconds / 1000)
        """,
}


@pytest.mark.parametrize("what", _CASES)
def test_arrays_that_change_meanwhile_break_nothing(what: str, tmp_path: object) -> None:
    """Removing ids that were not there any more wrote behind the members of the index."""
    code = _PREAMBLE + textwrap.dedent(_CASES[what])
    done = subprocess.run(
        [sys.executable, "-c", code, f"{tmp_path}/store.db"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stderr) == (0, "")
