# SPDX-License-Identifier: Apache-2.0
"""Blocks that differ and have one hash, made so: the hash is public and not cryptographic.

Bytes tell them apart wherever blocks are shared. Of a new version docs/format.md ("Block hash")
says otherwise, so it is left out here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.hashing import hash_blocks

Array = NDArray[np.float32]


def key(number: int) -> int:
    """Return an output of SplitMix64, of which the keys of the hash are."""
    most = (1 << 64) - 1
    z = (number + 1) * 0x9E3779B97F4A7C15 & most
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & most
    z = (z ^ z >> 27) * 0x94D049BB133111EB & most
    return z ^ z >> 31


def pair() -> tuple[Array, Array]:
    """Return two arrays of one shape and hash.

    In lane 0 of two stripes one half is that of the key, so that both products are 0; the other
    halves change places, so that the sums are equal.
    """
    arrays = []
    for halves in ((1.0, 2.0), (2.0, 1.0)):
        array = np.zeros((1, 64), np.float32)
        for stripe, half in enumerate(halves):
            array[0, 32 * stripe] = np.uint32(key(16 * stripe) & 0xFFFFFFFF).view(np.float32)
            array[0, 32 * stripe + 1] = half
        arrays.append(array)
    return arrays[0], arrays[1]


def holds(store: pydedup.Store, name: str, array: Array) -> bool:
    return store.load(name)["w"].tobytes() == array.tobytes()


@pytest.mark.parametrize("policy", [policies.Exact(), policies.Lossless(), policies.Bounded(0.5)])
def test_bytes_tell_them_apart(
    store: pydedup.Store, tmp_path: Path, policy: policies.Policy
) -> None:
    one, other = pair()
    assert one.tobytes() != other.tobytes()
    np.testing.assert_array_equal(hash_blocks(one, (1, 64)), hash_blocks(other, (1, 64)))
    store.add("one", {"w": one}, policy=policy)
    store.add("other", {"w": other}, policy=policy)
    store.add_many({"both-1": {"w": one}, "both-2": {"w": other}}, policy=policy)
    store.add("rows", {"w": one, "v": other}, policy=policy)
    target = f"sqlite:///{tmp_path}/target.db"
    with pydedup.open(target) as there:
        there.add("first", {"w": other}, policy=policy)
        store.copy_to(target)
        for opened in (store, there):
            assert holds(opened, "one", one)
            assert holds(opened, "other", other)
            assert holds(opened, "both-1", one)
            assert holds(opened, "both-2", other)
            assert opened.load("rows")["v"].tobytes() == other.tobytes()
            assert opened.verify().ok
            assert opened._adapter.count_blocks() == 2
