# SPDX-License-Identifier: Apache-2.0
"""Deltas of a lost page, which another store has as deltas, too, on bases of the same content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import pydedup
from pydedup import policies
from pydedup.types import DType

from ..relatives import adapted, dense, same_bits
from .conftest import check_reads, pages_of, ruin

Change = Callable[[str, int, Callable[[bytearray], Any]], None]


@pytest.mark.parametrize("source", ["backup", "whole", "other base"])
def test_deltas_are_deltas_again_where_the_base_is_the_same(
    store_url: str, change_page: Change, tmp_path: Path, source: str
) -> None:
    """A page of adapters has many blocks: by themselves they took 17 times what they had."""
    base = dense()
    model = adapted(base, 8)
    healthy = str(tmp_path / "healthy.db")
    with pydedup.open(store_url) as store:
        store.add("base", base)
        report = store.add("m", model)
        assert report.delta_blocks == report.blocks
        before = store.stats().page_bytes
        if source == "backup":
            store.backup(healthy)
        elif source == "whole":
            with pydedup.open(healthy) as other:
                other.add("m", model)
        else:
            with pydedup.open(healthy) as other:
                other.add("other", adapted(base, 2, seed=50))
                assert other.add("m", model).delta_blocks
    (page,) = set(pages_of(store_url, "m")).difference(pages_of(store_url, "base"))
    change_page(store_url, page, ruin)
    with pydedup.open(store_url) as store:
        repaired = store.verify(repair_from=healthy)
        assert repaired.ok
        assert repaired.repair is not None
        assert repaired.repair.found_blocks == report.blocks
        assert same_bits(store, "m", model)
        check_reads(store)
        taken = store.stats().page_bytes - before
        if source == "backup":
            assert taken < 0.1 * report.stored_bytes
        else:
            assert taken > 5 * report.stored_bytes


@pytest.mark.parametrize("kind", ["tuned", "bf16", "pruned", "exported"])
def test_deltas_are_deltas_again_from_the_file_of_their_model(
    store_url: str, change_page: Change, tmp_path: Path, kind: str
) -> None:
    """The bases are there: by themselves, blocks of a pruned model took 170 times what they had."""
    base = dense(dtype=DType.BF16 if kind == "bf16" else DType.F32)
    rng = np.random.default_rng(61)
    if kind == "exported":  # blocks at edges are not square
        base = {name: weight[:480, :352].copy() for name, weight in base.items()}

    def changed(weight: NDArray[Any]) -> NDArray[Any]:
        if kind == "exported":
            return np.ascontiguousarray(weight.T)
        if kind == "pruned":
            return np.where(np.abs(weight) < 0.013, 0, weight).astype(weight.dtype)
        return (weight + rng.normal(0, 0.0002, weight.shape)).astype("f4").astype(weight.dtype)

    model = {name: changed(weight) for name, weight in base.items()}
    with pydedup.open(store_url) as store:
        store.add("base", base)
        report = store.add("m", model)
        assert report.delta_blocks == report.blocks
        before = store.stats().page_bytes
        store.export("m", tmp_path / "m.safetensors")
    for page in set(pages_of(store_url, "m")).difference(pages_of(store_url, "base")):
        change_page(store_url, page, ruin)
    with pydedup.open(store_url) as store:
        repaired = store.verify(repair_from=tmp_path / "m.safetensors")
        assert repaired.ok
        assert repaired.repair is not None
        assert repaired.repair.found_blocks == report.blocks
        assert same_bits(store, "m", model)
        check_reads(store)
        assert store.stats().page_bytes < before + 4096
        store.vacuum()
        assert store.verify().ok
        assert same_bits(store, "m", model)


def test_no_delta_is_on_a_base_that_is_lost_itself(
    store_url: str, change_page: Change, tmp_path: Path
) -> None:
    """Of a base, only the next repair may know what it was."""
    base = dense()
    rng = np.random.default_rng(62)
    model = {k: (w + rng.normal(0, 0.0002, w.shape)).astype("f4") for k, w in base.items()}
    with pydedup.open(store_url) as store:
        store.add("base", base)
        store.add("m", model)
        for name in ("base", "m"):
            store.export(name, tmp_path / f"{name}.safetensors")
    for page in pages_of(store_url, "m"):
        change_page(store_url, page, ruin)
    with pydedup.open(store_url) as store:
        assert not store.verify(repair_from=tmp_path / "m.safetensors").ok
        assert same_bits(store, "m", model)
        assert store.explain("m").tensors[0].delta_blocks == 0
        assert store.verify(repair_from=tmp_path / "base.safetensors").ok
        assert same_bits(store, "base", base)


def test_what_was_promised_raw_is_raw(store_url: str, change_page: Change, tmp_path: Path) -> None:
    """Although another model has the same blocks, and a backup has them as deltas."""
    base = dense(1)
    model = adapted(base, 8)
    healthy = str(tmp_path / "healthy.db")
    with pydedup.open(healthy) as other:
        other.add("base", base)
        assert other.add("m", model).delta_blocks
    with pydedup.open(store_url) as store:
        store.add("base", base)
        store.add("m", model, policy=policies.Exact())
    for page in set(pages_of(store_url, "m")).difference(pages_of(store_url, "base")):
        change_page(store_url, page, ruin)
    with pydedup.open(store_url) as store:
        assert store.verify(repair_from=healthy).ok
        assert same_bits(store, "m", model)
        raw = sum(np.asarray(weight).nbytes for weight in model.values())
        assert store.explain("m").used_bytes >= raw


@pytest.mark.parametrize("source", ["origin", "export"])
def test_a_transposed_base_that_only_deltas_need(
    store_url: str, change_page: Change, tmp_path: Path, source: str
) -> None:
    """What is recorded of it does not say that its rows are their columns."""
    rng = np.random.default_rng(61)
    origin = {"l.weight": rng.normal(0, 0.02, (224, 160)).astype("f4")}
    export = {"MatMul_1": np.ascontiguousarray(origin["l.weight"].T)}
    file = tmp_path / f"{source}.safetensors"
    save_file(origin if source == "origin" else export, file)
    with pydedup.open(store_url) as store:
        store.add("origin", origin)
        report = store.add("export", export)
        assert report.delta_blocks == report.blocks
        (page,) = pages_of(store_url, "origin")
        store.remove("origin")
    change_page(store_url, page, ruin)
    with pydedup.open(store_url) as store:
        assert not store.verify().ok
        repaired = store.verify(repair_from=file)
        assert repaired.errors == []
        assert repaired.repair is not None
        assert repaired.repair.missing == ()
        assert same_bits(store, "export", export)
        check_reads(store)
