# SPDX-License-Identifier: Apache-2.0
"""The page of the spool that is being filled, which is read while blocks are added to it."""

from __future__ import annotations

import numpy as np

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.hashing import hash_view
from pydedup.ingest.spool import NO_BASE, Spool


def test_a_page_that_is_read_after_each_block_is_not_put_together_anew_each_time() -> None:
    """An add of thousands of small models took an eighth of its time for that."""
    rng = np.random.default_rng(0)
    with Spool(1 << 20) as spool, Spool(1 << 20) as other:
        for _ in range(50):
            view = MatrixView.of(rng.standard_normal((8, 8)).astype(np.float32), (8, 8))
            encoded = codec.encode_blocks(view, np.array([0]), planes=True)
            for one in (spool, other):
                bases, tags = np.array([NO_BASE]), np.zeros(1, np.uint64)
                one.append(view, np.array([0]), encoded, hash_view(view), bases, tags)
            number = spool.count - 1
            ((_, pages, _, slots),) = spool.windows(np.array([number]))
            assert (pages[0].n_slots, slots[0]) == (number + 1, number)
            assert len(spool._open._arena) == len(spool._open._columns) == 1
        read, at_once = (next(iter(one.windows(np.arange(50))))[1][0] for one in (spool, other))
        assert bytes(read.payload) == bytes(at_once.payload)
