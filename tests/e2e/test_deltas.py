# SPDX-License-Identifier: Apache-2.0
"""Families of nearly equal models: stored as deltas, given back as promised, kept while needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.graph import Graph, Node
from pydedup.hashing import hash_blocks, hash_keys
from pydedup.layout import base_places, block_places

Model = dict[str, NDArray[Any]]

SPREAD = 0.05
SHAPES = {"embedding": (600, 64), "hidden": (256, 320), "head": (9, 256), "bias": (256,)}


def base_model(seed: int = 0, dtype: Any = np.float32) -> Model:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * SPREAD).astype(dtype) for name, shape in SHAPES.items()
    }


def fine_tuned(model: Model, seed: int, share: float = 0.01) -> Model:
    """Every weight moved by a share of its tensor's spread, as AdamW moves them."""
    rng = np.random.default_rng(seed)
    moved = {name: share * SPREAD * rng.standard_normal(w.shape) for name, w in model.items()}
    return {name: (w.astype(np.float64) + moved[name]).astype(w.dtype) for name, w in model.items()}


def same(got: Mapping[str, NDArray[Any]], want: Model) -> bool:
    return list(got) == list(want) and all(
        got[name].dtype == w.dtype and got[name].tobytes() == w.tobytes()
        for name, w in want.items()
    )


def rel(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


GRAPH = Graph(
    ("x",),
    ("y",),
    (
        Node("linear", ("x",), "h", {"weight": "hidden", "bias": "bias"}, {}),
        Node("relu", ("h",), "r"),
        Node("linear", ("r",), "y", {"weight": "head"}, {}),
    ),
)


# ---- lossless ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_a_family_is_deltas_on_its_first_model(store: pydedup.Store, dtype: Any) -> None:
    base = base_model(dtype=dtype)
    first = store.add("base", base)
    family = {f"tenant-{i}": fine_tuned(base, i) for i in range(1, 4)}
    for name, model in family.items():
        report = store.add(name, model)
        assert report.delta_blocks >= report.blocks - 3  # all but the small ones
        assert report.stored_bytes < 0.95 * first.stored_bytes
        assert report.stored_bytes < (0.86 if dtype == np.float64 else 0.75) * report.logical_bytes
        assert report.certificate["largest_block_error"] == 0
    for name, model in {"base": base, **family}.items():
        assert same(store.load(name), model)
    assert store.verify().ok


@pytest.mark.parametrize(("dtype", "share"), [(ml_dtypes.bfloat16, 0.3), (np.float16, 0.38)])
def test_an_exact_delta_pays_on_a_base_a_third_of_a_block_away(
    store: pydedup.Store, dtype: Any, share: float
) -> None:
    base = {"w": base_model(dtype=dtype)["hidden"]}
    store.add("base", base)
    far = fine_tuned(base, 1, share)
    report = store.add("far", far, dry_run=True)
    store.remove("base")
    alone = store.add("alone", far)
    assert report.delta_blocks == report.blocks
    assert report.stored_bytes < 0.95 * alone.stored_bytes


def test_one_add_of_a_whole_family(store: pydedup.Store) -> None:
    base = base_model()
    models = {"a": base, "b": fine_tuned(base, 1), "c": fine_tuned(base, 2)}
    reports = store.add_many(models)
    assert reports[1].delta_blocks > 20
    assert reports[2].delta_blocks > 20
    assert sum(r.stored_bytes for r in reports[1:]) < 1.6 * reports[0].stored_bytes
    for name, model in models.items():
        assert same(store.load(name), model)
    assert store.verify().ok


@pytest.mark.parametrize("at_once", [True, False])
def test_a_chain_of_models_lies_around_its_first(store: pydedup.Store, at_once: bool) -> None:
    """The nearest is the model before, which is deltas: of those, their bases are the bases."""
    rng = np.random.default_rng(8)
    chain = {"a": rng.standard_normal((512, 256)).astype(np.float32)}
    for name, before, far in (("b", "a", 1e-3), ("c", "b", 1e-6)):
        noise = far * rng.standard_normal((512, 256)).astype(np.float32)
        chain[name] = chain[before] + noise
    models = {name: {"w": w} for name, w in chain.items()}
    reports = store.add_many(models) if at_once else [store.add(*model) for model in models.items()]
    assert [report.delta_blocks for report in reports] == [0, 32, 32]
    bases = set[int]()
    for name in models:
        block_map = store._catalog.model(name).block_map("w")
        own = set(block_places(block_map.page_ids, block_map.slots).tolist())
        if name == "a":
            bases = own
        else:
            assert set(base_places(block_map).tolist()) == bases
    for name, model in models.items():
        assert same(store.load(name), model)
    assert store.verify().ok


def test_exact_models_are_bases_too(store: pydedup.Store) -> None:
    base = base_model()
    assert store.add("base", base, policy=policies.Exact()).delta_blocks == 0
    variant = fine_tuned(base, 1)
    assert store.add("variant", variant).delta_blocks > 20
    assert store.add("again", fine_tuned(base, 2), policy=policies.Exact()).delta_blocks == 0
    assert same(store.load("variant"), variant)


def test_a_bf16_copy_is_a_delta_on_f32(store: pydedup.Store) -> None:
    base = base_model()
    store.add("base", base)
    half = {name: w.astype(ml_dtypes.bfloat16) for name, w in base.items()}
    report = store.add("half", half)
    assert report.delta_blocks > 20
    assert report.stored_bytes < 0.1 * report.logical_bytes
    assert same(store.load("half"), half)
    assert store.verify().ok


def test_bases_of_several_dtypes_at_the_places_of_one_tensor(store: pydedup.Store) -> None:
    """Some blocks of the bf16 model are deltas on f32, and the others on nothing."""
    base = {"w": base_model()["hidden"]}
    mixed = {"w": base["w"].astype(ml_dtypes.bfloat16)}
    mixed["w"][64:128] = base_model(1, ml_dtypes.bfloat16)["hidden"][:64]
    store.add("base", base)
    report = store.add("mixed", mixed)
    assert 0 < report.delta_blocks < report.blocks
    near = fine_tuned(mixed, 2)
    report = store.add("near", near)
    assert report.delta_blocks + report.shared_blocks == report.blocks
    assert same(store.load("near"), near)


def test_the_bytes_of_a_delta_as_another_dtype(store: pydedup.Store) -> None:
    """They have its hash, and are not what it is."""
    near = fine_tuned(base_model(), 1)
    store.add("base", base_model())
    assert store.add("near", near).delta_blocks > 0
    integers = {name: array.view(np.int32) for name, array in near.items()}
    assert store.add("integers", integers).damaged_pages == ()
    assert store.verify().errors == []
    assert same(store.load("integers"), integers)


def test_the_hash_of_a_delta_is_recorded_of_a_block_of_another_height(store: pydedup.Store) -> None:
    """It is not that block, which makes no page a damaged one."""
    near, lower = fine_tuned(base_model(), 1), {"w": base_model(2)["embedding"][:40]}
    store.add("base", base_model())
    assert store.add("near", near).delta_blocks > 0
    adapter = store._adapter
    taken = hash_keys(hash_blocks(lower["w"], (40, 64)))
    deltas = adapter.find_blocks(hash_keys(hash_blocks(near["embedding"], (64, 64))))
    with adapter.transaction():
        adapter.insert_blocks((*taken, row.page_id, row.slot, row.base_id) for row in deltas)
    report = store.add("lower", lower)
    assert (report.shared_blocks, report.damaged_pages) == (0, ())
    assert same(store.load("lower"), lower)


def test_models_of_other_widths_share(store: pydedup.Store) -> None:
    rng = np.random.default_rng(3)
    wide = rng.standard_normal((512, 256)).astype(np.float32)
    store.add("wide", {"w": wide})
    noise = 0.003 * rng.standard_normal((256, 128)).astype(np.float32)
    report = store.add("narrow", {"other.name": wide[128:384, 64:192] + noise})
    assert report.delta_blocks == report.blocks == 8
    assert same(store.load("narrow"), {"other.name": wide[128:384, 64:192] + noise})


def test_unrelated_models_are_no_deltas(store: pydedup.Store) -> None:
    store.add("one", base_model(1))
    report = store.add("other", {f"x.{k}": w for k, w in base_model(2).items()})
    assert report.delta_blocks == 0
    assert same(store.load("other"), {f"x.{k}": w for k, w in base_model(2).items()})


def test_strangers_of_the_same_names_do_not_hide_a_relative(store: pydedup.Store) -> None:
    rng = np.random.default_rng(5)

    def drawn() -> Model:
        return {f"layer{i}": rng.standard_normal((512, 512)).astype("f4") for i in range(6)}

    base = drawn()
    store.add("base", base)
    for number in range(4):
        assert store.add(f"stranger{number}", drawn()).delta_blocks == 0
    # Too far for the similarity index: only the place in the model tells what it is near to.
    moved = {k: w + 0.25 * rng.standard_normal(w.shape).astype("f4") for k, w in base.items()}
    report = store.add("relative", moved)
    assert report.delta_blocks > report.blocks / 2
    assert same(store.load("relative"), moved)


def test_families_that_are_added_at_once_find_their_relatives(store: pydedup.Store) -> None:
    """Among other models of the same names, and whichever model of the batch comes between."""
    rng = np.random.default_rng(6)

    def drawn() -> Model:
        return {f"layer{i}": rng.standard_normal((512, 512)).astype("f4") for i in range(4)}

    def moved(base: Model) -> Model:
        # Too far for the similarity index: only the place in the model tells what it is near to.
        return {k: w + 0.25 * rng.standard_normal(w.shape).astype("f4") for k, w in base.items()}

    bases = {name: drawn() for name in ("red", "green", "blue")}
    models = {**bases, **{f"{name}-moved": moved(base) for name, base in bases.items()}}
    reports = store.add_many(models)
    of = {report.model.partition("@")[0]: report for report in reports}
    for name in bases:
        assert of[name].delta_blocks == 0
        near = of[f"{name}-moved"]
        assert near.delta_blocks > near.blocks / 2
    assert all(same(store.load(name), model) for name, model in models.items())


def test_under_accuracy_a_relative_is_one_beyond_its_first_blocks(store: pydedup.Store) -> None:
    rng = np.random.default_rng(7)
    base = {f"layer{i}": rng.standard_normal((512, 512)).astype("f4") for i in range(6)}
    store.add("base", base)
    moved = {k: w + 0.25 * rng.standard_normal(w.shape).astype("f4") for k, w in base.items()}
    policy = policies.Accuracy(lambda _: 1.0, 0.1, max_rel_error=0.4)
    report = store.add("moved", moved, policy=policy)
    assert report.shared_blocks == report.blocks, "the metric does not care"


def test_odd_values_survive(store: pydedup.Store) -> None:
    base = base_model()
    base["hidden"][3, 5] = np.nan
    base["hidden"][100, 200] = -np.inf
    base["embedding"][:64] = 0.0
    base["embedding"][70, :3] = [-0.0, 1e-42, np.finfo(np.float32).max]
    store.add("base", base)
    variant = fine_tuned(base, 1)
    variant["hidden"][3, 5] = -np.nan
    variant["embedding"][:64] = 0.0
    store.add("variant", variant)
    assert same(store.load("variant"), variant)
    assert store.verify().ok


# ---- computing with deltas ---------------------------------------------------------------------


def test_predictions_from_deltas_are_those_of_the_model(store: pydedup.Store) -> None:
    base = base_model()
    store.add("base", base)
    variant = fine_tuned(base, 1)
    report = store.add("variant", variant, graph=GRAPH)
    assert report.delta_blocks > 20
    x = np.random.default_rng(5).standard_normal((7, 320)).astype(np.float32)
    hidden = np.maximum(x @ variant["hidden"].T + variant["bias"], 0)
    want = hidden @ variant["head"].T
    np.testing.assert_allclose(store.predict("variant", x), want, rtol=1e-4, atol=1e-5)
    table = store.tensor("variant", "embedding")
    ids = np.array([[0, 5, 599], [63, 64, 65]])
    assert np.array_equal(table.take(ids), variant["embedding"][ids])
    np.testing.assert_allclose(
        table.bag(ids, mode="mean"), variant["embedding"][ids].mean(1), rtol=1e-5, atol=1e-6
    )


def test_explain_says_what_is_a_delta_and_how_far_it_is(store: pydedup.Store) -> None:
    base = base_model()
    store.add("base", base)
    variant = fine_tuned(base, 1)
    store.add("exact", variant)
    report = store.add("close", fine_tuned(base, 2), policy=policies.Bounded(0.001))
    by_name = {t.tensor.name: t for t in store.explain("close").tensors}
    hidden = by_name["hidden"]
    assert hidden.delta_blocks == hidden.blocks == hidden.distinct_blocks == 20
    assert hidden.shared_blocks == 0 < hidden.shared_bytes  # those of the bases
    assert 0 < hidden.largest_error <= 0.001
    assert (
        max(t.largest_error for t in by_name.values())
        == (report.certificate["largest_block_error"])
    )
    assert by_name["bias"].delta_blocks == 0
    assert by_name["bias"].largest_error == 0
    exact = store.explain("exact")
    assert {t.largest_error for t in exact.tensors} == {0.0}
    assert {other.model for other in exact.shared_with} == {"base@1", "close@1"}
    assert 0 < exact.removal_frees_bytes < exact.shared_bytes


# ---- updates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [policies.Exact(), policies.Lossless(), policies.Bounded(0.003)])
def test_an_update_stores_what_changed(
    store: pydedup.Store, policy: policies.Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_model()
    store.add("other", base)
    model = fine_tuned(base, 1)
    first = store.add("m", model, policy=policy)
    newer = {name: w.copy() for name, w in model.items()}
    newer["hidden"][64:128, 64:128] *= 1.01
    second = store.add("m", newer, policy=policy)
    assert second.shared_blocks == second.blocks - 1
    assert second.stored_bytes <= 0.1 * first.stored_bytes + 16384
    loaded = store.load("m@2")
    if policy.max_rel_error == 0:
        assert same(loaded, newer)
    else:
        assert max(rel(loaded[name], w) for name, w in newer.items()) <= policy.max_rel_error
    assert store.verify().ok
    store._pool.clear()
    with monkeypatch.context() as patch:  # where nothing changed, no page is looked at
        patch.setattr(
            store._adapter, "read_recorded_pages", lambda _: pytest.fail("a page is read")
        )
        third = store.add("m", newer, policy=policy)
    assert (third.shared_blocks, third.stored_bytes) == (third.blocks, 0)


@pytest.mark.parametrize("order", ["abc", "cab"])
def test_versions_of_several_models_that_share_parts_of_a_page(
    store: pydedup.Store, order: str
) -> None:
    """What each reads is recorded without reading anything, from what the versions before read."""
    weight = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    weight[:64] *= np.float32(2) ** np.arange(64, dtype=np.float32)
    weight[64:128] = 1  # blocks of very different sizes
    parts = {"a": {"w": weight}, "b": {"w": weight[:64]}, "c": {"w": weight[64:]}}
    models = {name: parts[name] for name in order}
    for _ in range(2):
        reports = store.add_many(models, block_shape=(64, 64))
        assert store.verify().errors == []
    assert sum(report.stored_bytes for report in reports) == 0
    for name in order:
        assert store.info(f"{name}@1").used_bytes == store.info(f"{name}@2").used_bytes


def test_a_stricter_update_looks_at_everything_again(store: pydedup.Store) -> None:
    base = base_model()
    store.add("other", base)
    model = fine_tuned(base, 1)
    store.add("m", model, policy=policies.Bounded(0.01))
    assert not same(store.load("m"), model)
    store.add("m", model)
    assert same(store.load("m@2"), model)


def test_a_stricter_update_takes_no_tensor_over_that_is_too_far(store: pydedup.Store) -> None:
    """Also where others of the version before are as they were."""
    base = base_model()
    store.add("other", base)
    model = {**base, "hidden": fine_tuned(base, 1)["hidden"]}
    store.add("m", model, policy=policies.Bounded(0.1))
    assert 0.005 < rel(store.load("m")["hidden"], model["hidden"]) < 0.1
    store.add("m", model, policy=policies.Bounded(0.001))
    assert 0 < rel(store.load("m@2")["hidden"], model["hidden"]) <= 0.001


def test_an_update_may_change_shapes_types_and_names(store: pydedup.Store) -> None:
    model = base_model()
    store.add("m", model)
    newer = {**model, "hidden": model["hidden"][:, :100].copy(), "new": model["head"] * 2}
    newer["embedding"] = model["embedding"].view(np.int32)  # the same bytes
    del newer["bias"]
    store.add("m", newer)
    assert same(store.load("m"), newer)
    assert store.verify().ok


@pytest.mark.parametrize(("before", "after"), [("", "module."), ("model.", ""), ("a.b.", "c.")])
def test_an_update_under_another_prefix_keeps_what_is_unchanged(
    store: pydedup.Store, before: str, after: str
) -> None:
    base = base_model()
    store.add("other", base)
    model = fine_tuned(base, 1)
    bounded = policies.Bounded(0.01)
    first = store.add("m", {before + name: w for name, w in model.items()}, policy=bounded)
    assert first.certificate["largest_block_error"] > 0
    store.add("nearer", model, policy=policies.Exact())  # what a new search would find
    newer = {name: w.copy() for name, w in model.items()}
    newer["hidden"][:64, :64] *= 1.1
    second = store.add("m", {after + name: w for name, w in newer.items()}, policy=bounded)
    one, two = store.load("m@1"), store.load("m@2")
    for name, w in newer.items():
        old, new = one[before + name], two[after + name]
        is_changed = (w != model[name]).any()
        assert is_changed or np.array_equal(old, new)
        errors = second.certificate["tensor_errors"]
        assert rel(new, w) <= errors.get(after + name, 0.0) <= 0.01
    hidden = two[after + "hidden"]
    assert np.array_equal(hidden[64:], one[before + "hidden"][64:])
    assert rel(hidden[:64, :64], newer["hidden"][:64, :64]) <= 0.01
    assert store.verify().ok


def test_an_update_whose_names_end_alike(store: pydedup.Store) -> None:
    model = {f"{i}.weight": base_model(i)["hidden"] for i in range(3)}
    store.add("m", model)
    newer = {
        "weight": model["1.weight"],
        "x.2.weight": model["0.weight"],
        "1.weight.": model["2.weight"],
    }
    store.add("m", newer)
    assert same(store.load("m"), newer)
    assert store.verify().ok


# ---- upkeep ------------------------------------------------------------------------------------


def test_a_base_lives_as_long_as_a_delta_needs_it(store: pydedup.Store) -> None:
    base = base_model()
    variant = fine_tuned(base, 1)
    store.add("base", base)
    store.add("variant", variant)
    store.remove("base")
    store.vacuum()
    assert same(store.load("variant"), variant)
    assert store.verify().ok
    third = fine_tuned(base, 2)
    assert store.add("third", third).delta_blocks > 20  # on what is left of the first
    assert same(store.load("third"), third)
    store.remove("variant")
    store.vacuum()
    assert same(store.load("third"), third)
    store.remove("third")
    report = store.vacuum()
    assert report.pages_after == 0


def test_a_repacked_family_stays_what_it_was(store: pydedup.Store) -> None:
    base = base_model()
    models = {f"m{i}": fine_tuned(base, i) for i in range(6)}
    for name, model in models.items():
        store.add(name, model)
    for name in ("m0", "m2", "m4"):
        store.remove(name)
    report = store.vacuum()
    assert report.pages_after <= report.pages_before
    for name in ("m1", "m3", "m5"):
        assert same(store.load(name), models[name])
    assert store.verify().ok
    late = fine_tuned(base, 9)
    assert store.add("late", late).delta_blocks > 20  # repacked pages are indexed again
    assert same(store.load("late"), late)


def test_damaged_signatures_cost_space_and_nothing_else(store: pydedup.Store) -> None:
    base = base_model()
    store.add("base", base)
    adapter = store._adapter
    with adapter.transaction():
        found = [(s, g, p) for g in _groups(store) for s, p in adapter.signatures(g)]
        adapter.delete_signatures([segment for segment, _, _ in found])
        adapter.insert_signatures((s, g, p[: len(p) // 2]) for s, g, p in found)
    variant = {f"v.{name}": w for name, w in fine_tuned(base, 1).items()}
    store.add("variant", variant)
    assert same(store.load("variant"), variant)


def _groups(store: pydedup.Store) -> list[int]:
    from pydedup.signatures import group_of
    from pydedup.types import DType

    return [0, *(group_of((DType.F32, r, c)) for r, c in ((64, 64), (24, 64), (9, 256), (1, 256)))]


def test_dry_run_says_what_deltas_would_save(store: pydedup.Store) -> None:
    base = base_model()
    store.add("base", base)
    variant = fine_tuned(base, 1)
    before = store.stats()
    plan = store.add("variant", variant, dry_run=True)
    assert plan.dry_run
    assert store.stats().pages == before.pages
    assert [m.name for m in store.models()] == ["base"]
    real = store.add("variant", variant)
    for field in ("stored_bytes", "blocks", "shared_blocks", "delta_blocks", "pages"):
        assert getattr(plan, field) == getattr(real, field)
