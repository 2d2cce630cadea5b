# SPDX-License-Identifier: Apache-2.0
"""Relatives with a merged low-rank adapter, as ``merge_and_unload`` of LoRA leaves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import pydedup
from pydedup import policies
from pydedup.errors import QuotaError
from pydedup.ingest import low_rank, match
from pydedup.layout import PAGE_CAPACITY
from pydedup.types import DType

from .relatives import adapted, added_beside, dense, same_bits

LOSSLESS = policies.Lossless()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rank", "most"),
    [
        (DType.F32, 1, 0.05),
        (DType.F32, 8, 0.08),
        (DType.F32, 16, 0.12),
        (DType.BF16, 1, 0.10),
        (DType.BF16, 8, 0.12),
        (DType.BF16, 32, 0.16),
        (DType.F32, 64, 0.40),
        (DType.BF16, 64, 0.25),
        (DType.F16, 8, 0.12),
    ],
)
def test_a_merged_adapter_takes_little_more_than_the_adapter(
    store: pydedup.Store, dtype: DType, rank: int, most: float, joint: bool
) -> None:
    base = dense(dtype=dtype)
    model = adapted(base, rank)
    report = added_beside(store, base, model, LOSSLESS, joint=joint, before=LOSSLESS)
    assert report.delta_blocks == report.blocks
    assert report.stored_bytes < most * report.logical_bytes
    assert same_bits(store, "m", model)
    assert store.verify().ok


@pytest.mark.parametrize(("rank", "most"), [(1, 0.008), (8, 0.025), (32, 0.05)])
def test_within_a_bound_the_factors_are_nearly_all(
    store: pydedup.Store, rank: int, most: float
) -> None:
    base = dense()
    model = adapted(base, rank)
    report = added_beside(store, base, model, policies.Bounded(0.001), joint=False)
    assert report.delta_blocks == report.blocks
    assert report.stored_bytes < most * report.logical_bytes
    for name, got in store.load("m").items():
        assert np.linalg.norm(got - model[name]) <= 0.001 * np.linalg.norm(model[name])
    assert store.verify().ok


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_adapters_that_are_merged_one_after_the_other(store: pydedup.Store, dtype: DType) -> None:
    """Each sum was rounded, so the third version seemed to have no low rank any more."""
    model = dense(dtype=dtype)
    store.add("m", model)
    for version in range(1, 6):
        model = adapted(model, 4, seed=70 + version)
        report = store.add("m", model)
        assert report.delta_blocks == report.blocks
        most = 0.04 + 0.02 * version if dtype is DType.F32 else 0.12 + 0.03 * version
        assert report.stored_bytes < most * report.logical_bytes
        assert same_bits(store, "m", model)
    assert store.verify().ok


def test_a_merged_model_that_was_saved_in_a_wider_dtype(store: pydedup.Store) -> None:
    base = dense(dtype=DType.BF16)
    model = {name: w.astype("f4") for name, w in adapted(base, 8).items()}
    report = added_beside(store, base, model, LOSSLESS, joint=False)
    assert report.delta_blocks == report.blocks
    assert report.stored_bytes < 0.06 * report.logical_bytes
    assert same_bits(store, "m", model)


@pytest.mark.parametrize("shape", [(500, 300), (64, 4096), (4096, 64), (256, 64, 3, 3)])
def test_blocks_at_the_edge_and_convolutions(store: pydedup.Store, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(33)
    base = {"w": rng.normal(0, 0.02, (shape[0], int(np.prod(shape[1:])))).astype("f4")}
    model = {"w": adapted(base, 2)["w"].reshape(shape)}
    base = {"w": base["w"].reshape(shape)}
    report = added_beside(store, base, model, LOSSLESS, joint=False)
    assert report.delta_blocks == report.blocks
    assert report.stored_bytes < 0.09 * report.logical_bytes
    assert same_bits(store, "m", model)


@pytest.mark.parametrize("shape", [(512, 4096), (1024, 3072)])
def test_pages_of_a_wide_matrix_are_as_high_as_wide(
    store: pydedup.Store, shape: tuple[int, int]
) -> None:
    """In the order of blocks, each page had the factors of nearly all columns once more."""
    rng = np.random.default_rng(35)
    base = {"w": rng.normal(0, 0.02, shape).astype("f4")}
    model = adapted(base, 64)
    report = added_beside(store, base, model, LOSSLESS, joint=False)
    assert report.pages <= 2
    assert report.stored_bytes < 0.18 * report.logical_bytes
    before = store.stats().stored_bytes
    store.remove("base")
    store.vacuum()
    assert store.stats().stored_bytes <= before
    assert same_bits(store, "m", model)
    assert store.verify().ok


@pytest.mark.parametrize("lookup", [30, 34, 42])
def test_what_is_looked_up_together_is_no_part_of_what_moved(
    store: pydedup.Store, monkeypatch: pytest.MonkeyPatch, lookup: int
) -> None:
    """Of 4096 x 11008 each look-up ended within rows that then were half known, and not moved."""
    base = {"w": np.random.default_rng(37).normal(0, 0.02, (1024, 384)).astype("f4")}
    model = adapted(base, 4)
    store.add("base", base)
    four_rows = 4 * 64 * 384
    monkeypatch.setattr(low_rank, "_TOGETHER", four_rows)
    monkeypatch.setattr(low_rank, "_MOST_TOGETHER", four_rows)
    whole = store.add("m", model, dry_run=True).stored_bytes
    monkeypatch.setattr(match, "LOOKUP_BLOCKS", lookup)
    assert store.add("m", model).stored_bytes < 1.1 * whole
    assert same_bits(store, "m", model)


def test_blocks_of_nearly_a_page_beside_an_adapter(store: pydedup.Store) -> None:
    """Pages were to be filled a little less than they are, so such blocks did not fit on any."""
    rng = np.random.default_rng(36)
    base = {"w": rng.normal(0, 0.02, (512, 500)).astype("f4")}
    large = {"large": rng.integers(0, 256, (1000, 1040), np.uint8)}  # does not compress
    models = {f"m{n}": adapted(base, 8, seed=n) for n in range(2)}
    whole = large["large"].shape
    store.add("base", base, block_shape=whole)
    store.add_many({name: model | large for name, model in models.items()}, block_shape=whole)
    assert max(row.payload_bytes for row in store._adapter.page_rows()) > 0.97 * PAGE_CAPACITY
    store.remove("m0")
    store.vacuum()
    assert same_bits(store, "m1", models["m1"] | large)
    assert store.verify().ok


def test_an_adapter_of_some_of_the_rows(store: pydedup.Store) -> None:
    """Of queries and values, say, in one matrix with keys that did not move."""
    base = dense()
    model = adapted(base, 4)
    for name, weight in model.items():
        weight[64:256] = base[name][64:256]
    report = added_beside(store, base, model, LOSSLESS, joint=False)
    assert report.shared_blocks == report.blocks * 3 // 8
    assert report.delta_blocks == report.blocks * 5 // 8
    assert report.stored_bytes < 0.05 * report.logical_bytes
    assert same_bits(store, "m", model)


def test_what_has_no_low_rank_is_stored_as_before(store: pydedup.Store) -> None:
    """Weights that all moved, some that are infinite, and those of which a row alone moved."""
    base = dense(3)
    rng = np.random.default_rng(34)
    model = {name: w + rng.normal(0, 2e-4, w.shape).astype("f4") for name, w in base.items()}
    model["l1.weight"] = adapted(base, 4)["l1.weight"]
    model["l1.weight"][3, 7] = np.inf
    model["l2.weight"] = base["l2.weight"].copy()
    model["l2.weight"][5] += 1
    added_beside(store, base, model, LOSSLESS, joint=False)
    assert same_bits(store, "m", model)
    assert store.verify().ok


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan, 1e38, 1e-42])
def test_elements_that_are_no_weights_come_back(store: pydedup.Store, odd: float) -> None:
    base = dense(1)
    base["l0.weight"][3, 5] = odd
    model = adapted(base, 4)
    added_beside(store, base, model, LOSSLESS, joint=False, before=LOSSLESS)
    assert same_bits(store, "m", model)
    assert store.verify().ok


def test_adapters_of_several_tenants(store: pydedup.Store, tmp_path: Path) -> None:
    """Each is on the base's blocks; removed, copied, packed anew and restored, they are whole."""
    base = dense(4)
    models = {f"t{n}": adapted(base, 4 + 4 * n, seed=40 + n) for n in range(4)}
    store.add("base", base)
    for name, model in models.items():
        planned = store.add(name, model, dry_run=True)
        report = store.add(name, model)
        assert (planned.stored_bytes, planned.pages) == (report.stored_bytes, report.pages)
        assert report.stored_bytes < 0.12 * report.logical_bytes
    store.remove("base")
    store.remove("t1")
    before = {name: store.info(name).pages for name in ("t0", "t2", "t3")}
    dry, wet = store.vacuum(dry_run=True), store.vacuum()
    assert dry.page_bytes_after == wet.page_bytes_after == store.stats().page_bytes
    assert before.keys() == {model.name for model in store.models()}
    assert store.verify().ok
    for name in before:
        assert same_bits(store, name, models[name])
    copy = f"sqlite:///{tmp_path / 'copy.db'}"
    store.copy_to(copy, ["t2", "t3"])
    with pydedup.open(copy) as other:
        assert other.verify().ok
        for name in ("t2", "t3"):
            assert same_bits(other, name, models[name])
        # Beside what is there already, one block after another.
        store.copy_to(copy, ["t0"])
        assert other.verify().ok
        assert same_bits(other, "t0", models["t0"])


def test_pages_are_full_of_what_blocks_take_there(store: pydedup.Store, small_pages: None) -> None:
    """Blocks with their factors each would need four times as many pages."""
    base = dense(4)
    model = adapted(base, 16)
    added_beside(store, base, model, LOSSLESS, joint=False)
    capacity = 256 * 1024
    rows = {row.id: row.payload_bytes for row in store._adapter.page_rows()}
    assert max(rows.values()) <= capacity
    base_id = store._catalog.model("base").row.id
    of_base = {page for _, page, _, _ in store._adapter.model_pages(base_id)}
    own = [size for page, size in rows.items() if page not in of_base]
    assert len(own) <= 1.5 * sum(own) / capacity + 1
    assert store.verify().ok


def test_a_new_layout_has_no_page_that_is_too_large(
    store: pydedup.Store, small_pages: None
) -> None:
    """What had a factor for many blocks goes; of those that stay, few had bytes for it."""
    base = dense(12)
    whole = {f"t{n}": adapted(base, 16, seed=60 + n) for n in range(2)}
    store.add("base", base)
    store.add_many(whole)
    halves = {
        f"half{name}": {
            key: np.concatenate([base[key][:256], weight[256:]]) for key, weight in model.items()
        }
        for name, model in whole.items()
    }
    for name, model in halves.items():
        store.add(name, model)
    for name in whole:
        store.remove(name)
    dry, wet = store.vacuum(dry_run=True), store.vacuum()
    assert dry.repacked_pages == wet.repacked_pages > 0
    assert dry.repacked_bytes == wet.repacked_bytes
    assert dry.models == wet.models
    assert max(row.payload_bytes for row in store._adapter.page_rows()) <= 256 * 1024
    assert store.vacuum().repacked_pages == 0
    assert store.verify().ok
    for name, model in halves.items():
        assert same_bits(store, name, model)


def test_a_quota_is_checked_on_the_layout_that_is_stored(
    store: pydedup.Store, tmp_path: Path, small_pages: None
) -> None:
    """It was on another one, which took more: what would have fit was refused."""
    base, mine = dense(6), {"tenant": "b"}
    model = adapted(base, 30)
    with pydedup.open(f"sqlite:///{tmp_path / 'free.db'}") as free:
        free.add("base", base)
        free.add("m", model, metadata=mine)
        usage = next(one for one in free.stats(by="tenant").values if one.value == "b")
    store.add("base", base)
    store.quotas.set("tenant", "b", usage.marginal_bytes - 1)
    with pytest.raises(QuotaError):
        store.add("m", model, metadata=mine)
    store.quotas.set("tenant", "b", usage.marginal_bytes)
    store.add("m", model, metadata=mine)


def test_a_quota_is_of_what_is_stored(store: pydedup.Store) -> None:
    base = dense()
    model = adapted(base, 16)
    store.add("base", base, metadata={"tenant": "a"})
    planned = store.add("m", model, metadata={"tenant": "b"}, dry_run=True).stored_bytes
    store.quotas.set("tenant", "b", int(1.1 * planned))
    assert store.add("m", model, metadata={"tenant": "b"}).stored_bytes == planned


def test_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    base = dense(6)
    model = adapted(base, 8)
    checksums = []
    for workers in (1, 3):
        with pydedup.open(f"sqlite:///{tmp_path / f'{workers}.db'}") as store:
            store.add("base", base)
            store.add("m", model, workers=workers)
            checksums.append([row.checksum for row in store._adapter.page_rows()])
    assert checksums[0] == checksums[1]


def test_what_is_served(store: pydedup.Store) -> None:
    """Products, rows and torch modules of weights that are deltas with factors."""
    base = dense()
    model = adapted(base, 8)
    added_beside(store, base, model, LOSSLESS, joint=False)
    weight = model["l0.weight"]
    x = np.random.default_rng(35).standard_normal((5, weight.shape[1])).astype("f4")
    stored = store.tensor("m", "l0.weight")
    np.testing.assert_allclose(stored.matmul(x), x @ weight.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stored.take([3, 500, 64]), weight[[3, 500, 64]])
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
    linear.load_state_dict({"weight": torch.from_numpy(weight)})
    store.add("linear", linear)
    with torch.no_grad():
        wanted = linear(torch.from_numpy(x))
    attached = torch.nn.Linear(*weight.shape[::-1], bias=False).eval()
    store.attach(attached, "linear")
    torch.testing.assert_close(attached(torch.from_numpy(x)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "word"), [(DType.F32, 0x7F800001), (DType.BF16, 0x7F81), (DType.F16, 0x7C01)]
)
def test_a_nan_that_signals_comes_back(store: pydedup.Store, dtype: DType, word: int) -> None:
    """numpy warned of it, where warnings are errors the add failed."""
    base = dense(1, dtype)
    model = adapted(base, 4)
    for weight in (base["l0.weight"], model["l0.weight"]):
        weight.view(f"u{dtype.itemsize}")[3, 4] = word
    added_beside(store, base, model, LOSSLESS, joint=False, before=LOSSLESS)
    assert same_bits(store, "m", model)


def test_a_matrix_that_became_zero_comes_back(store: pydedup.Store) -> None:
    """It is minus its base, which has a low rank, and zeros have no spacing."""
    base = {"w": np.zeros((64, 64), np.float32)}
    base["w"][:, 0] = 1
    for policy in (LOSSLESS, policies.Bounded(0.01)):
        store.add("base", base)
        store.add("base", {"w": np.zeros((64, 64), np.float32)}, policy=policy)
        assert not store.load("base")["w"].any()
    assert store.verify().ok


def test_an_exact_delta_takes_the_place_of_one_within_a_bound(store: pydedup.Store) -> None:
    """Within a bound that bf16 is about as fine as: what is recorded is of the delta that stays."""
    base = dense(dtype=DType.BF16)
    model = adapted(base, 4)
    model["l1.weight"][:64] = adapted(model, 4, seed=60, share=0.05)["l1.weight"][:64]
    for bound in (1e-4, 1e-3, 3e-3, 1e-2):
        store.add("base", base)
        store.add("m", model, policy=policies.Bounded(bound))
        assert store.verify().ok
        for name, got in store.load("m").items():
            wide = model[name].astype("f8")
            assert np.linalg.norm(got.astype("f8") - wide) <= bound * np.linalg.norm(wide)
        store.remove("m")
        store.vacuum()
