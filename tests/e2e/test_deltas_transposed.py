# SPDX-License-Identifier: Apache-2.0
"""Matrices that are the transpose of stored ones, as those of an exported model are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.ingest import alike, stored_models
from pydedup.maintenance import orphans
from pydedup.types import DType

from .relatives import Model, adapted, added_beside, same_bits, share_of

LOSSLESS = policies.Lossless()
# Several of a shape, square ones among them; edges; of less than a block; above what is gathered.
SHAPES = (384, 256), (384, 256), (256, 256), (256, 256), (200, 150), (70, 300), (40, 48), (512, 160)


def drawn(dtype: DType = DType.F32, seed: int = 71) -> Model:
    """Return weights (outputs, inputs) and biases of a drawn model."""
    rng = np.random.default_rng(seed)
    model: Model = {}
    for i, shape in enumerate(SHAPES):
        spread = 0.02 if dtype.is_float else 30
        model[f"l{i}.bias"] = rng.normal(0, spread, shape[:1]).astype("f4").astype(dtype.numpy)
        model[f"l{i}.weight"] = rng.normal(0, spread, shape).astype("f4").astype(dtype.numpy)
    return model


def exported(model: Model, *, prefix: str = "onnx::MatMul_") -> Model:
    """Return the model with its weights (inputs, outputs) under names that say nothing."""
    return {
        f"{prefix}{number}": np.ascontiguousarray(tensor.T)
        for number, tensor in enumerate(model.values(), 100)
    }


def tuned(model: Model, seed: int) -> Model:
    """Return the model with all weights moved by one percent of their spread."""
    rng = np.random.default_rng(seed)
    return {
        name: (tensor + rng.normal(0, 0.0002, tensor.shape)).astype("f4").astype(tensor.dtype)
        for name, tensor in model.items()
    }


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_an_exported_model_takes_next_to_nothing(
    store: pydedup.Store, dtype: DType, joint: bool
) -> None:
    model = drawn(dtype)
    report = added_beside(store, model, exported(model), LOSSLESS, joint=joint)
    assert share_of(report) < 0.01
    assert same_bits(store, "m", exported(model))
    assert store.verify().ok


@pytest.mark.parametrize("policy", [LOSSLESS, policies.Bounded(0.001)], ids=lambda p: p.name)
def test_an_exported_fine_tune_takes_what_the_fine_tune_does(
    store: pydedup.Store, tmp_path: Path, policy: policies.Policy
) -> None:
    base = drawn()
    model = tuned(base, 72)
    report = added_beside(store, base, exported(model), policy, joint=False, before=LOSSLESS)
    with pydedup.open(f"sqlite:///{tmp_path}/other.db") as other:
        as_it_is = added_beside(other, base, model, policy, joint=False, before=LOSSLESS)
    assert share_of(report) < share_of(as_it_is) + 0.01
    loaded = store.load("m")
    for name, tensor in exported(model).items():
        away = np.linalg.norm(loaded[name].astype("f8") - tensor)
        assert away <= 1.0001 * policy.max_rel_error * np.linalg.norm(tensor.astype("f8"))
    assert store.verify().ok


def test_a_base_of_another_dtype(store: pydedup.Store) -> None:
    model = drawn()
    narrow = {name: t.astype(DType.BF16.numpy) for name, t in exported(model).items()}
    assert share_of(added_beside(store, model, narrow, LOSSLESS, joint=False)) < 0.02
    assert same_bits(store, "m", narrow)


def test_products_and_rows_of_transposed_bases(store: pydedup.Store) -> None:
    model = drawn()
    exports = exported(model)
    added_beside(store, model, exports, LOSSLESS, joint=False)
    rng = np.random.default_rng(73)
    for name, weight in exports.items():
        if weight.ndim != 2:
            continue
        rows, cols = weight.shape
        tensor = store.tensor("m", name)
        x, y = (rng.standard_normal((5, n)).astype("f4") for n in (cols, rows))
        assert np.allclose(tensor.matmul(x), x.astype("f8") @ weight.T, rtol=1e-4, atol=1e-5)
        assert np.allclose(tensor.matmul(y, transpose=True), y @ weight, rtol=1e-4, atol=1e-5)
        assert tensor.take([0, rows - 1]).tobytes() == weight[[0, -1]].tobytes()


WIDTH = 320
# Rows of the queries, keys and values of each layer, as in attention whose heads share the latter.
PROJECTIONS = {"q": WIDTH, "k": 128, "v": 128}


def attention(dtype: DType = DType.F32, layers: int = 2, seed: int = 171) -> Model:
    """Return projections (outputs, inputs) of drawn attention layers, and what comes after them."""
    rng = np.random.default_rng(seed)
    shapes = {name: (rows, WIDTH) for name, rows in PROJECTIONS.items()} | {"o": (WIDTH, 200)}
    return {
        f"{layer}.{name}": rng.normal(0, 0.02, shape).astype("f4").astype(dtype.numpy)
        for layer in range(layers)
        for name, shape in shapes.items()
    }


def packed(model: Model, axis: int = 0) -> Model:
    """Return the model with the projections of each layer in one matrix."""
    made: Model = {}
    for name, tensor in model.items():
        layer, kind = name.split(".")
        if kind == "q":
            parts = [model[f"{layer}.{one}"] for one in PROJECTIONS]
            tensor = np.concatenate(parts, axis)
        if kind not in ("k", "v"):
            made[f"{layer}.packed" if kind == "q" else name] = tensor
    return made


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_matrices_that_an_export_packs_into_one(
    store: pydedup.Store, dtype: DType, joint: bool
) -> None:
    model = attention(dtype)
    export = exported(packed(model))
    assert {tensor.shape for tensor in export.values()} == {(WIDTH, 576), (200, WIDTH)}
    assert share_of(added_beside(store, model, export, LOSSLESS, joint=joint)) < 0.01
    assert same_bits(store, "m", export)
    assert store.verify().ok
    x = np.random.default_rng(172).standard_normal((3, WIDTH)).astype("f4")
    weight = export["onnx::MatMul_100"]
    y = store.tensor("m", "onnx::MatMul_100").matmul(x, transpose=True)
    assert np.allclose(y, x.astype("f8") @ weight.astype("f8"), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("joint", [False, True])
def test_matrices_that_a_module_packs_and_an_export_has_apart(
    store: pydedup.Store, joint: bool
) -> None:
    model = attention()
    report = added_beside(store, packed(model), exported(model), LOSSLESS, joint=joint)
    assert share_of(report) < 0.01
    assert same_bits(store, "m", exported(model))


def test_matrices_that_are_packed_one_below_the_other(store: pydedup.Store) -> None:
    """Of which the parts are as long as one another on the other side."""
    model = {
        f"{layer}.{name}": np.ascontiguousarray(attention()[f"{layer}.{name}"].T)
        for layer in range(2)
        for name in PROJECTIONS
    }
    export = exported(packed(model, axis=1))
    assert {tensor.shape for tensor in export.values()} == {(576, WIDTH)}
    assert share_of(added_beside(store, model, export, LOSSLESS, joint=False)) < 0.01
    assert share_of(store.add("back", exported(model))) < 0.01
    assert same_bits(store, "m", export)


@pytest.mark.parametrize("policy", [LOSSLESS, policies.Bounded(0.001)], ids=lambda p: p.name)
def test_descendants_of_a_model_that_are_exported_and_packed(
    store: pydedup.Store, tmp_path: Path, policy: policies.Policy
) -> None:
    """With its adapters and its fine-tunes, and where only the first of these is left."""
    base = attention()
    store.add("base", base)
    for kind, (descend, most) in {
        "adapted": (with_adapter, 0.1),
        "tuned": (tuned, 0.7),
    }.items():
        for i in range(2):
            model = exported(packed(descend(base, 173 + i)))
            with pydedup.open(f"sqlite:///{tmp_path}/{kind}{i}.db") as other:
                apart = added_beside(
                    other, base, exported(descend(base, 173 + i)), policy, joint=False
                )
            report = store.add(f"{kind}{i}", model, policy=policy)
            assert share_of(report) < min(share_of(apart) + 0.03, most)
            if policy == LOSSLESS:
                assert same_bits(store, f"{kind}{i}", model)
    assert store.verify().ok


def test_packed_matrices_of_which_some_parts_are_not_stored(store: pydedup.Store) -> None:
    model = attention()
    store.add("base", {name: tensor for name, tensor in model.items() if ".k" not in name})
    export = exported(packed(model))
    missing = sum(tensor.nbytes for name, tensor in model.items() if ".k" in name)
    report = store.add("m", export)
    assert report.stored_bytes < missing + 0.01 * report.logical_bytes
    assert same_bits(store, "m", export)


@pytest.mark.parametrize("joint", [False, True])
def test_a_matrix_that_is_another_of_its_own_model(store: pydedup.Store, joint: bool) -> None:
    """As of an embedding and the output layer that is tied to it."""
    embedding = np.random.default_rng(74).normal(0, 0.02, (1000, 256)).astype("f4")
    model = {"wte.weight": embedding, "lm_head": np.ascontiguousarray(embedding.T)}
    others = {"other": drawn()} if joint else {}
    report = store.add_many({"m": model, **others})[0]
    assert share_of(report) < 0.47
    assert same_bits(store, "m", model)


def test_a_new_version_of_an_exported_model(store: pydedup.Store) -> None:
    """What changed is at the place of deltas whose bases have other rows and columns."""
    model = drawn()
    first = exported(model)
    added_beside(store, model, first, LOSSLESS, joint=False)
    second = {name: tensor.copy() for name, tensor in first.items()}
    for tensor in second.values():
        tensor[-3:] *= np.float32(1.0078125)
    report = store.add("m", second)
    assert share_of(report) < 0.03
    assert same_bits(store, "m@1", first)
    assert same_bits(store, "m@2", second)
    assert store.verify().ok


def test_tenants_of_an_exported_model_once_its_origin_is_gone(store: pydedup.Store) -> None:
    base = drawn()
    models = {"base": base, "export": exported(base)}
    models |= {f"t{i}": exported(tuned(base, 75 + i)) for i in range(3)}
    reports = {name: store.add(name, model) for name, model in models.items()}
    assert all(0.5 < share_of(reports[f"t{i}"]) < 0.7 for i in range(3))
    store.remove("base@1")
    store.vacuum()
    del models["base"]
    assert all(same_bits(store, name, model) for name, model in models.items())
    assert store.verify().ok


def with_adapter(model: Model, seed: int) -> Model:
    """Return the model with an adapter of rank 4 merged into its weights."""
    return model | adapted({n: t for n, t in model.items() if t.ndim == 2}, 4, seed)


@pytest.mark.parametrize("is_there", [False, True], ids=["origin", "origin and export"])
@pytest.mark.parametrize("policy", [LOSSLESS, policies.Bounded(0.001)], ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_adapters_in_an_exported_model(
    store: pydedup.Store, dtype: DType, policy: policies.Policy, is_there: bool
) -> None:
    base = drawn(dtype)
    store.add("base", base)
    if is_there:
        assert share_of(store.add("export", exported(base))) < 0.01
    tenants = {f"t{i}": exported(with_adapter(base, 90 + i)) for i in range(3)}
    for name, model in tenants.items():
        assert share_of(store.add(name, model, policy=policy)) < 0.13
        if policy is LOSSLESS:
            assert same_bits(store, name, model)
    assert store.verify().ok


def test_adapters_in_an_exported_fine_tune(store: pydedup.Store) -> None:
    """One of them is kept whole, and the others are small."""
    base = drawn()
    region = tuned(base, 94)
    store.add("base", base)
    assert share_of(store.add("region", exported(region))) < 0.7
    tenants = {f"t{i}": exported(with_adapter(region, 95 + i)) for i in range(4)}
    shares = [share_of(store.add(name, model)) for name, model in tenants.items()]
    assert sum(share > 0.5 for share in shares) == 1
    assert max(shares[-2:]) < 0.15
    assert all(same_bits(store, name, model) for name, model in tenants.items())


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_both_ways_to_keep_weights_in_turn(store: pydedup.Store, dtype: DType) -> None:
    base = drawn(dtype)
    models = {"base": base}
    for i in range(3):
        tenant = with_adapter(base, 100 + i)
        models |= {f"t{i}": tenant, f"e{i}": exported(tenant)}
    reports = [store.add(name, model) for name, model in models.items()]
    assert all(share_of(report) < 0.13 for report in reports[1:])
    assert all(same_bits(store, name, model) for name, model in models.items())


def nearness(model: Model) -> Callable[[Mapping[str, NDArray[Any]]], float]:
    """Return a metric: 1 less how far weights are from these, on average."""

    def evaluate(weights: Mapping[str, NDArray[Any]]) -> float:
        away = (weights[name].astype("f8") - tensor for name, tensor in model.items())
        sizes = (np.linalg.norm(tensor.astype("f8")) for tensor in model.values())
        return 1 - float(np.mean([np.linalg.norm(a) / s for a, s in zip(away, sizes, strict=True)]))

    return evaluate


def test_accuracy_has_transposed_bases_for_what_is_not_replaced(store: pydedup.Store) -> None:
    base = drawn()
    model = exported(tuned(base, 105))
    store.add("base", base)
    report = store.add("m", model, policy=policies.Accuracy(nearness(model), 0))
    assert report.delta_blocks > 0.9 * (report.blocks - len(SHAPES))
    assert same_bits(store, "m", model)


@pytest.mark.parametrize("kind", ["fine-tune", "adapter"])
def test_accuracy_of_an_export_costs_what_it_does_of_the_model(
    store: pydedup.Store, tmp_path: Path, kind: str
) -> None:
    base, max_drop = drawn(), 0.004
    model = tuned(base, 124) if kind == "fine-tune" else with_adapter(base, 125)
    shares = []
    with pydedup.open(f"sqlite:///{tmp_path}/other.db") as other:
        for at, weights in (other, model), (store, exported(model)):
            at.add("base", base)
            evaluate = nearness(weights)
            report = at.add("m", weights, policy=policies.Accuracy(evaluate, max_drop))
            assert evaluate(at.load("m")) == report.certificate["metric_after"] >= 1 - max_drop
            shares.append(share_of(report))
    assert shares[1] < shares[0] + 0.01
    assert store.verify().ok


def test_accuracy_does_not_replace_what_takes_no_less_so(store: pydedup.Store) -> None:
    """A block that is another, transposed, is a delta without a change."""
    base = drawn()
    store.add("base", base)
    anything = policies.Accuracy(lambda weights: 1.0, 0)
    report = store.add("m", exported(base), policy=anything)
    assert share_of(report) < 0.01
    assert report.certificate["replaced"] == 0
    assert same_bits(store, "m", exported(base))


def test_copies_have_transposed_bases_as_well(store: pydedup.Store, tmp_path: Path) -> None:
    base = drawn()
    exports = exported(tuned(base, 80))
    added_beside(store, base, exports, LOSSLESS, joint=False)
    empty, other = (f"sqlite:///{tmp_path}/{name}.db" for name in ("empty", "other"))
    store.copy_to(empty, ["m"])
    with pydedup.open(other) as opened:  # there the bases are deltas themselves
        opened.add("origin", tuned(base, 81))
        opened.add("base", base)
    store.copy_to(other, ["m"])
    for url in (empty, other):
        with pydedup.open(url) as opened:
            assert same_bits(opened, "m", exports)
            assert opened.verify().ok


def test_a_dry_run_says_what_an_add_does(store: pydedup.Store) -> None:
    model = drawn()
    store.add("base", model)
    said = store.add("m", exported(model), dry_run=True)
    assert said.stored_bytes == store.add("m", exported(model)).stored_bytes


def test_exact_keeps_it_whole(store: pydedup.Store) -> None:
    model = drawn()
    report = added_beside(store, model, exported(model), policies.Exact(), joint=False)
    assert report.delta_blocks == 0
    assert same_bits(store, "m", exported(model))


def test_many_of_one_shape_in_another_order(
    store: pydedup.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mixture of experts, each is looked for among all: these are not asked each time."""
    rng = np.random.default_rng(106)
    model = {f"e{i}": rng.normal(0, 0.02, (48, 40)).astype("f4") for i in range(60)}
    exports = {
        f"x{i:02}": np.ascontiguousarray(model[f"e{number}"].T)
        for i, number in enumerate(rng.permutation(60))
    }
    store.add("base", model)
    asked = []
    stored_blocks = alike.stored_blocks

    def counted(*args: Any) -> Any:
        asked.append(args)
        return stored_blocks(*args)

    monkeypatch.setattr(alike, "stored_blocks", counted)
    assert share_of(store.add("m", exports)) < 0.01
    assert len(asked) <= 4 * len(model)
    assert same_bits(store, "m", exports)


@pytest.mark.parametrize("policy", [LOSSLESS, policies.Bounded(0.001)], ids=lambda p: p.name)
def test_the_nearest_of_those_that_are_near(store: pydedup.Store, policy: policies.Policy) -> None:
    """The newest one may be farther away than an older one."""
    base = drawn()
    rng = np.random.default_rng(107)
    far = {n: (t + rng.normal(0, 0.001, t.shape)).astype("f4") for n, t in base.items()}
    shares = []
    for name, model in ("as it is", tuned(base, 108)), ("exported", exported(tuned(base, 109))):
        for other, weights in ("base", base), ("far", far):
            store.add(f"{other} {name}", weights, policy=policies.Exact())
        shares.append(share_of(store.add(name, model, policy=policy)))
    assert shares[1] < shares[0] + 0.01


@pytest.mark.parametrize("policy", [LOSSLESS, policies.Bounded(0.001)], ids=lambda p: p.name)
def test_a_transpose_that_is_nearer_than_what_is_not_one(
    store: pydedup.Store, policy: policies.Policy
) -> None:
    """Of exported fine-tunes one is kept whole; what changed of an export is no delta on that."""
    base = drawn()
    export = exported(base)
    store.add("base", base)
    store.add("export", export)
    store.add("far", exported(tuned(base, 110)), policy=policies.Exact())
    changed = {name: tensor.copy() for name, tensor in export.items()}
    for tensor in changed.values():
        tensor[-3:] *= np.float32(1.0078125)
    assert share_of(store.add("export", changed, policy=policy)) < 0.02
    narrow = {name: tensor.astype(DType.BF16.numpy) for name, tensor in export.items()}
    assert share_of(store.add("narrow", narrow, policy=policy)) < 0.02
    assert policy is not LOSSLESS or same_bits(store, "export", changed)
    assert policy is not LOSSLESS or same_bits(store, "narrow", narrow)
    assert store.verify().ok


@pytest.mark.parametrize("policy", [LOSSLESS, policies.Bounded(0.001)], ids=lambda p: p.name)
@pytest.mark.parametrize("side", [96, 256])
def test_square_matrices_of_further_exports(
    store: pydedup.Store, side: int, policy: policies.Policy
) -> None:
    """The blocks on their diagonals are, in each export, deltas on the same base."""
    rng = np.random.default_rng(111)
    base = {f"l{i}": rng.normal(0, 0.02, (side, side)).astype("f4") for i in range(20)}
    store.add("base", base)
    models = {f"t{i}": exported(tuned(base, 112 + i)) for i in range(3)}
    shares = [share_of(store.add(name, model, policy=policy)) for name, model in models.items()]
    assert max(shares) < min(shares) + 0.01
    assert policy is not LOSSLESS or all(same_bits(store, *each) for each in models.items())


def test_a_model_of_which_some_matrices_are_not_transposed(store: pydedup.Store) -> None:
    """Those that end attention, in PyTorch's encoders, are not, and come first."""
    rng = np.random.default_rng(116)
    straight = {f"out{i}": rng.normal(0, 0.02, (320, 320)).astype("f4") for i in range(6)}
    others = {f"w{i}": rng.normal(0, 0.02, (320, 384)).astype("f4") for i in range(4)}
    store.add("base", straight | others)
    model = tuned(straight, 117) | exported(tuned(others, 118))
    report = store.add("m", model)
    assert report.delta_blocks == report.blocks
    assert same_bits(store, "m", model)


@pytest.mark.parametrize("joint", [False, True])
def test_what_comes_once_the_origin_is_gone(
    store: pydedup.Store, joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks are still there, as the bases of another export's deltas."""
    monkeypatch.setattr(orphans, "_LEAST_OF_BLOCKS", 1.0)  # nor did a vacuum do without them
    base = drawn()
    store.add("base", base)
    first = exported(tuned(base, 119))
    taken = share_of(store.add("m", first))
    store.remove("base@1")
    store.vacuum()
    models = {
        "m": exported(tuned(base, 120)),
        "export": exported(base),
        "tenant": exported(with_adapter(base, 121)),
    }
    if joint:
        reports = store.add_many(models)
    else:
        reports = [store.add(name, model) for name, model in models.items()]
    assert all(
        share_of(report) < most
        for report, most in zip(reports, (taken + 0.01, 0.02, 0.13), strict=True)
    )
    assert same_bits(store, "m@1", first)
    assert all(same_bits(store, name, model) for name, model in models.items())
    assert store.verify().ok


@pytest.mark.parametrize("is_there", [True, False], ids=["origin", "another export"])
def test_an_origin_that_many_models_came_after(
    store: pydedup.Store, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """It is not among the newest models, but the index knows its blocks."""
    monkeypatch.setattr(stored_models, "NEWEST", 1)
    base = drawn()
    store.add("base", base)
    if not is_there:
        store.add("export", exported(base))
        store.remove("base@1")
    store.add("other", drawn(seed=122))
    model = exported(tuned(base, 123))
    assert share_of(store.add("m", model)) < 0.7
    assert same_bits(store, "m", model)


def test_a_tensor_of_which_the_blocks_in_the_middle_are_at_its_edge(store: pydedup.Store) -> None:
    """Of 6 columns too little is left to be found, and two looks in vain are all there are."""
    rng = np.random.default_rng(126)
    base = {f"l{i}": rng.normal(0, 0.02, (1000, 70)).astype("f4") for i in range(4)}
    store.add("base", base)
    shares = [share_of(store.add(f"t{i}", exported(tuned(base, 127 + i)))) for i in range(3)]
    assert max(shares) < min(shares) + 0.01
