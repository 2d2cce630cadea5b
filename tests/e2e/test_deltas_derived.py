# SPDX-License-Identifier: Apache-2.0
"""Models derived from a fine-tune that is itself stored as deltas: tenants of a region, nights."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies, registry
from pydedup.errors import QuotaError
from pydedup.types import DType

from .damage import change
from .relatives import Model, share_of

LOSSLESS = policies.Lossless()
SHAPE = 512, 384


class Family:
    """A pretrained model, and what is made of it, of one seed."""

    def __init__(self, dtype: DType = DType.F32, seed: int = 41) -> None:
        self._rng = np.random.default_rng(seed)
        self._dtype = dtype
        weights = {f"l{i}.weight": self._noise(0.02) for i in range(2)}
        self.pretrained = {name: self._rounded(weight) for name, weight in weights.items()}

    def tuned(self, model: Model) -> Model:
        """Return the model with every weight trained."""
        return self._plus(model, lambda: self._noise(0.0002))

    def adapted(self, model: Model, rank: int = 8) -> Model:
        """Return the model with a low-rank adapter merged."""

        def adapter() -> NDArray[np.float64]:
            by = self._rng.normal(size=(SHAPE[0], rank)) @ self._rng.normal(size=(rank, SHAPE[1]))
            return by * (0.0002 / rank**0.5)

        return self._plus(model, adapter)

    def next_night(self, model: Model, share: float = 0.03) -> Model:
        """Return the model with some rows trained."""
        return self._plus(
            model, lambda: self._noise(0.0002) * (self._rng.random((SHAPE[0], 1)) < share)
        )

    def _noise(self, spread: float) -> NDArray[np.float64]:
        return self._rng.normal(0, spread, SHAPE)

    def _rounded(self, weight: NDArray[Any]) -> NDArray[Any]:
        return weight.astype("f4").astype(self._dtype.numpy)

    def _plus(self, model: Model, by: Any) -> Model:
        return {name: self._rounded(w.astype("f8") + by()) for name, w in model.items()}


def check_bits(store: pydedup.Store, models: dict[str, Model]) -> None:
    for name, model in models.items():
        loaded = store.load(name)
        assert all(loaded[key].tobytes() == w.tobytes() for key, w in model.items()), name
    assert store.verify().ok


def test_tenants_of_a_tuned_model_are_small_from_the_second_on(store: pydedup.Store) -> None:
    """The first is kept whole: with the fine-tune's bases each would take as much as that."""
    family = Family()
    models = {"base": family.pretrained, "region": family.tuned(family.pretrained)}
    models |= {f"t{i}": family.adapted(models["region"]) for i in range(4)}
    reports = [store.add(name, model) for name, model in models.items()]
    assert reports[1].delta_blocks == reports[1].blocks
    assert reports[2].delta_blocks == 0
    for report in reports[3:]:
        assert report.delta_blocks == report.blocks
        assert share_of(report) < 0.16
    check_bits(store, models)


def test_what_fits_a_quota_only_as_deltas_is_stored_as_deltas(
    store: pydedup.Store, tmp_path: Path
) -> None:
    """It was refused: its blocks were to be kept whole, as bases of tenants that might come."""
    family = Family()
    models = {"base": family.pretrained, "region": family.tuned(family.pretrained)}
    models["t"] = family.adapted(models["region"])
    for name in ("base", "region"):
        store.add(name, models[name])
    whole = store.add("t", models["t"], dry_run=True)
    assert whole.delta_blocks == 0
    mine = {"tenant": "t"}
    store.quotas.set("tenant", "t", int(0.8 * whole.logical_bytes))
    planned = store.add("t", models["t"], metadata=mine, dry_run=True)
    report = store.add("t", models["t"], metadata=mine)
    assert planned.stored_bytes == report.stored_bytes < whole.stored_bytes
    assert report.delta_blocks == report.blocks
    check_bits(store, models)
    with pydedup.open(tmp_path / "source.db") as source:
        source.add("region", models["region"])
        source.add("mine@1", family.adapted(models["region"]), metadata={"tenant": "m"})
        (copied,) = source.copy_to(store.url, ["mine"]).models
        assert copied.delta_blocks == 0
        store.remove("mine")
        store.vacuum()
        store.quotas.set("tenant", "m", int(0.8 * whole.logical_bytes))
        (copied,) = source.copy_to(store.url, ["mine"]).models
        assert copied.delta_blocks == copied.blocks
    store.quotas.set("tenant", "n", 10_000)
    with pytest.raises(QuotaError, match="this add, tenant=n would take"):
        store.add("n", family.adapted(models["region"]), metadata={"tenant": "n"})


def test_tenants_in_bf16_pay_for_a_base_once_enough_are_there(store: pydedup.Store) -> None:
    family = Family(DType.BF16)
    models = {"base": family.pretrained, "region": family.tuned(family.pretrained)}
    models |= {f"t{i}": family.adapted(models["region"]) for i in range(6)}
    reports = [store.add(name, model) for name, model in models.items()]
    whole = [report.delta_blocks == 0 for report in reports]
    assert sum(whole[1:]) == 1
    assert share_of(reports[-1]) < 0.65 * share_of(reports[1])
    check_bits(store, models)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize("policy", [LOSSLESS, policies.Bounded(0.001)], ids=lambda p: p.name)
def test_nightly_updates_of_a_tuned_model(
    store: pydedup.Store, dtype: DType, policy: policies.Policy
) -> None:
    family = Family(dtype)
    night = family.tuned(family.pretrained)
    store.add("base", family.pretrained, policy=policy)
    tuned = store.add("m", night, policy=policy)
    shares = []
    for _ in range(10):
        night = family.next_night(night)
        shares.append(share_of(store.add("m", night, policy=policy)))
    # Less than each night alone, and less than twice what the best would be: one whole, all small.
    assert sum(shares) < 0.7 * 10 * share_of(tuned) + 1
    assert min(shares) < 0.25 * share_of(tuned)
    assert store.verify().ok
    if policy is LOSSLESS:
        check_bits(store, {"m": night})


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_fine_tunes_of_one_model_all_stay_deltas_on_it(store: pydedup.Store, dtype: DType) -> None:
    family = Family(dtype)
    models = {"base": family.pretrained}
    models |= {f"t{i}": family.tuned(family.pretrained) for i in range(6)}
    reports = [store.add(name, model) for name, model in models.items()]
    for report in reports[1:]:
        assert report.delta_blocks == report.blocks
    check_bits(store, models)


def test_in_one_add(store: pydedup.Store) -> None:
    family = Family()
    models = {"base": family.pretrained, "region": family.tuned(family.pretrained)}
    models |= {f"t{i}": family.adapted(models["region"]) for i in range(4)}
    reports = store.add_many(models)
    assert reports[2].delta_blocks == 0
    assert sum(report.stored_bytes for report in reports[3:]) < 0.5 * reports[2].logical_bytes
    check_bits(store, models)


def test_tenants_of_several_regions_find_their_own(store: pydedup.Store) -> None:
    """The newest models are of other regions, and have bases that are farther away."""
    family = Family()
    models = {"base": family.pretrained}
    models |= {f"r{i}": family.tuned(family.pretrained) for i in range(4)}
    models |= {f"r{i % 4}-t{i // 4}": family.adapted(models[f"r{i % 4}"]) for i in range(12)}
    reports = {name: store.add(name, model) for name, model in models.items()}
    for number in range(4):
        assert reports[f"r{number}-t0"].delta_blocks == 0
        for tenant in (1, 2):
            assert share_of(reports[f"r{number}-t{tenant}"]) < 0.16
    check_bits(store, models)


def test_what_one_was_derived_from_may_be_gone(store: pydedup.Store) -> None:
    family = Family()
    models = {"base": family.pretrained, "region": family.tuned(family.pretrained)}
    models |= {f"t{i}": family.adapted(models["region"]) for i in range(3)}
    for name in ("base", "region", "t0", "t1"):
        store.add(name, models[name])
    for name in ("base", "region", "t0"):
        store.remove(name)
    store.vacuum()
    assert share_of(store.add("t2", models["t2"])) < 0.16
    check_bits(store, {name: models[name] for name in ("t1", "t2")})


@pytest.mark.parametrize("lost", ["region", "t0"])
def test_a_relative_that_cannot_be_read_is_left_out(url: str, lost: str) -> None:
    """What is near is only looked for, so an add goes on without it."""
    family = Family()
    models = {"base": family.pretrained, "region": family.tuned(family.pretrained)}
    models |= {f"t{i}": family.adapted(models["region"]) for i in range(3)}
    with pydedup.open(url) as store:
        for name in ("base", "region", "t0"):
            store.add(name, models[name])
    adapter = registry.connect(url, mode="r")
    with contextlib.closing(adapter):
        pages = {
            row.name: {page_id for _, page_id, *_ in adapter.model_pages(row.id)}
            for row in adapter.models()
        }
    own = max(pages[lost] - pages["base"])
    change(url, "DELETE FROM {pages} WHERE id = ?", own)
    with pydedup.open(url) as store:
        for name in ("t1", "t2"):
            report = store.add(name, models[name])
            assert report.damaged_pages == ((own,) if name == "t1" else report.damaged_pages)
            loaded = store.load(name)
            assert all(loaded[key].tobytes() == w.tobytes() for key, w in models[name].items())
    assert share_of(report) < 0.5


def test_only_parts_that_were_trained_anew_become_bases(store: pydedup.Store) -> None:
    family = Family()
    region = family.tuned(family.pretrained)
    tenant = region | {"l1.weight": family.adapted(region)["l1.weight"]}
    store.add("base", family.pretrained)
    store.add("region", region)
    report = store.add("tenant", tenant)
    assert report.shared_blocks == report.delta_blocks == report.blocks // 2
    assert 0.8 < share_of(report) * 2 < 0.9
    check_bits(store, {"tenant": tenant})


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_nightly_updates_of_an_embedding_with_the_frequent_first(
    store: pydedup.Store, dtype: DType
) -> None:
    """Its first rows are all trained each night, few of the others: these tell what pays."""
    rng = np.random.default_rng(44)
    base = rng.normal(0, 0.02, (8192, 64)).astype("f4")
    share = np.where(np.arange(len(base)) < 512, 1, 0.01)

    def trained(weight: NDArray[Any], share: NDArray[np.float64] | float) -> NDArray[Any]:
        at = rng.random(len(weight)) < share
        return weight + rng.normal(0, 0.0002, weight.shape).astype("f4") * at[:, np.newaxis]

    night = trained(base, 1)
    store.add("base", {"e.weight": base.astype(dtype.numpy)})
    tuned = share_of(store.add("m", {"e.weight": night.astype(dtype.numpy)}))
    shares = []
    for _ in range(8):
        night = trained(night, share)
        shares.append(share_of(store.add("m", {"e.weight": night.astype(dtype.numpy)})))
    assert min(shares) < 0.35 * tuned
    assert sum(shares) < 0.6 * 8 * tuned
    check_bits(store, {"m": {"e.weight": night.astype(dtype.numpy)}})


@pytest.mark.parametrize(
    ("dtype", "across", "most"),
    [
        (DType.F32, False, 0.040),
        (DType.F32, True, 0.058),
        (DType.BF16, False, 0.022),
        (DType.BF16, True, 0.052),
    ],
)
def test_few_rows_or_columns_are_no_adapter(
    store: pydedup.Store, dtype: DType, across: bool, most: float
) -> None:
    """Their difference has a low rank, but a delta says in fewer bytes where they are."""
    family = Family(dtype)
    rng = np.random.default_rng(43)
    model = {}
    for name, weight in family.pretrained.items():
        trained = weight.astype("f4")
        at = rng.random(SHAPE[across]) < 0.05
        by = rng.normal(0, 0.0002, SHAPE).astype("f4") * (at if across else at[:, None])
        model[name] = (trained + by).astype(dtype.numpy)
    store.add("base", family.pretrained)
    assert share_of(store.add("m", model)) < most
    check_bits(store, {"m": model})
