# SPDX-License-Identifier: Apache-2.0
"""A bit that flips in a page, on each back end: it is found, named, and harms nobody else."""

from __future__ import annotations

import numpy as np
import pytest

import pydedup
from pydedup import policies, registry
from pydedup.errors import CorruptStoreError


def flip_a_bit(url: str, page_id: int) -> None:
    """Change a stored page behind the back of everybody."""
    adapter = registry.connect(url, mode="a")
    dialect = adapter._sql.dialect  # type: ignore[attr-defined]
    ((_, payload),) = adapter.read_pages([page_id])
    broken = bytearray(payload)
    broken[len(broken) // 2] ^= 1
    change = f"UPDATE {dialect.name('pages')} SET payload = {dialect.placeholder}"  # noqa: S608
    with adapter.transaction():
        adapter._write(f"{change} WHERE id = {dialect.placeholder}", [bytes(broken), page_id])  # type: ignore[attr-defined]
    adapter.close()


def test_damage_is_found(store_url: str) -> None:
    rng = np.random.default_rng(0)
    models = {
        name: {"w": rng.standard_normal((1000, 100)), "b": rng.standard_normal(100)}
        for name in ("mine", "theirs")
    }
    with pydedup.open(store_url) as store:
        for name, model in models.items():
            store.add(name, model, policy=policies.Exact())
        assert store.verify().ok
        info = store.info("mine").info
    adapter = registry.connect(store_url, mode="r")
    page_id = adapter.model_pages(info.id)[0][1]
    adapter.close()
    flip_a_bit(store_url, page_id)
    with pydedup.open(store_url) as store:
        report = store.verify()
        assert not report.ok
        assert f"page {page_id}" in report.errors[0]
        assert any("mine@1" in error for error in report.errors)
        assert not any("theirs@1" in error for error in report.errors)
        with pytest.raises(CorruptStoreError, match=f"page {page_id}"):
            store.load("mine")
        assert np.array_equal(store.load("theirs")["w"], models["theirs"]["w"])
