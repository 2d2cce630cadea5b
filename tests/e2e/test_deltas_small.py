# SPDX-License-Identifier: Apache-2.0
"""Relatives of models of small tensors, which are matched many at a time."""

from __future__ import annotations

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.types import DType

from .relatives import Model, adapted, added_beside, same_bits, share_of

LOSSLESS = policies.Lossless()
# Whole blocks, blocks at edges, and of less than one.
SHAPES = (256, 192), (128, 64), (200, 150), (48, 40)


def small(dtype: DType = DType.F32, seed: int = 51) -> Model:
    """Return weights and biases of a drawn model of layers of at most 192 KiB."""
    rng = np.random.default_rng(seed)
    model = {}
    for i, shape in enumerate(SHAPES):
        model[f"l{i}.bias"] = rng.normal(0, 0.02, shape[:1]).astype("f4").astype(dtype.numpy)
        model[f"l{i}.weight"] = rng.normal(0, 0.02, shape).astype("f4").astype(dtype.numpy)
    return model


def weights(model: Model) -> Model:
    return {name: tensor for name, tensor in model.items() if tensor.ndim == 2}


def tuned(model: Model, seed: int, rows: float = 1) -> Model:
    """Return the model with that share of the rows of its weights trained."""
    rng = np.random.default_rng(seed)
    changed = {}
    for name, weight in weights(model).items():
        by = rng.normal(0, 0.0002, weight.shape) * (rng.random((len(weight), 1)) < rows)
        changed[name] = (weight + by).astype("f4").astype(weight.dtype)
    return model | changed


def with_adapter(model: Model, seed: int, rank: int = 4) -> Model:
    return model | adapted(weights(model), rank, seed)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("dtype", "policy", "most"),
    [
        (DType.F32, LOSSLESS, 0.085),
        (DType.BF16, LOSSLESS, 0.115),
        (DType.F16, LOSSLESS, 0.115),
        (DType.F32, policies.Bounded(0.001), 0.03),
    ],
    ids=str,
)
def test_a_merged_adapter_takes_little_more_than_the_adapter(
    store: pydedup.Store, dtype: DType, policy: policies.Policy, most: float, joint: bool
) -> None:
    base = small(dtype)
    model = with_adapter(base, 52)
    report = added_beside(store, base, model, policy, joint=joint, before=LOSSLESS)
    assert share_of(report) < most
    if policy is LOSSLESS:
        assert same_bits(store, "m", model)
    assert store.verify().ok


def test_tensors_that_differ_otherwise_do_not_hide_an_adapter(store: pydedup.Store) -> None:
    """A head that was trained anew comes first, and what is frozen lies between."""
    base = {"head.weight": np.ones((64, 64), "f4"), **small()}
    rng = np.random.default_rng(53)
    head = rng.normal(0, 0.02, (64, 64)).astype("f4")
    frozen = {f"f{i}.weight": rng.normal(0, 0.02, (64, 96)).astype("f4") for i in range(8)}
    base = {"head.weight": base["head.weight"], **frozen, **small()}
    model = {"head.weight": head, **frozen, **with_adapter(small(), 54)}
    report = added_beside(store, base, model, LOSSLESS, joint=False)
    assert report.stored_bytes - head.nbytes < 0.085 * report.logical_bytes
    assert same_bits(store, "m", model)


def test_tenants_of_a_tuned_model_are_small_from_the_second_on(store: pydedup.Store) -> None:
    """The first is kept whole: with the fine-tune's bases each would take as much as that."""
    base = small()
    region = tuned(base, 55)
    models = {"base": base, "region": region}
    models |= {f"t{i}": with_adapter(region, 56 + i) for i in range(4)}
    reports = [store.add(name, model) for name, model in models.items()]
    assert share_of(reports[1]) > 0.6
    assert share_of(reports[2]) > 0.8
    for report in reports[3:]:
        assert share_of(report) < 0.15
    assert all(same_bits(store, name, model) for name, model in models.items())
    assert store.verify().ok


@pytest.mark.parametrize("block_shape", [(8, 300), (300, 8), (24, 96)])
def test_tenants_of_a_tuned_model_in_blocks_of_a_few_rows(
    store: pydedup.Store, block_shape: tuple[int, int]
) -> None:
    """A block of 8 rows has no lower rank than two adapters: all tenants were kept whole."""
    rng = np.random.default_rng(57)
    base = {f"l{i}.weight": rng.normal(0, 0.02, (256, 192)).astype("f4") for i in range(3)}
    region = tuned(base, 58)
    models = {"base": base, "region": region}
    models |= {f"t{i}": with_adapter(region, 59 + i) for i in range(3)}
    reports = [store.add(name, model, block_shape=block_shape) for name, model in models.items()]
    for report in reports[3:]:
        assert share_of(report) < 0.15
    assert all(same_bits(store, name, model) for name, model in models.items())
    assert store.verify().ok


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize("policy", [LOSSLESS, policies.Bounded(0.001)], ids=lambda p: p.name)
def test_nightly_updates_of_a_tuned_model(
    store: pydedup.Store, dtype: DType, policy: policies.Policy
) -> None:
    base = small(dtype)
    night = tuned(base, 60)
    store.add("base", base, policy=policy)
    first = share_of(store.add("m", night, policy=policy))
    shares = []
    for number in range(10):
        night = tuned(night, 61 + number, rows=0.03)
        shares.append(share_of(store.add("m", night, policy=policy)))
    # Less than each night alone, and less than twice what the best would be: one whole, all small.
    assert sum(shares) < 0.6 * 10 * first + 1
    assert min(shares) < 0.45 * first
    assert store.verify().ok
    if policy is LOSSLESS:
        assert same_bits(store, "m", night)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_fine_tunes_of_one_model_all_stay_deltas_on_it(store: pydedup.Store, dtype: DType) -> None:
    base = small(dtype)
    store.add("base", base)
    models = {f"t{i}": tuned(base, 70 + i) for i in range(6)}
    reports = [store.add(name, model) for name, model in models.items()]
    for report in reports[1:]:
        assert report.delta_blocks == reports[0].delta_blocks
        assert share_of(report) < 1.01 * share_of(reports[0])
    assert all(same_bits(store, name, model) for name, model in models.items())


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_tenants_of_several_models_in_turn(store: pydedup.Store, dtype: DType) -> None:
    """The newest models are none that the next one is made of."""
    bases = [small(dtype, 80 + i) for i in range(4)]
    tenants = [with_adapter(bases[i % 4], 90 + i) for i in range(8)]
    store.add_many({f"base{i}": base for i, base in enumerate(bases)})
    for number, model in enumerate(tenants):
        assert share_of(store.add(f"t{number}", model)) < 0.115
    assert all(same_bits(store, f"t{i}", model) for i, model in enumerate(tenants))


def test_tenants_of_several_fine_tunes_in_turn(store: pydedup.Store) -> None:
    """All are near to one base, and each to the tenants of its own fine-tune."""
    base = small()
    tunes = [tuned(base, 100 + i) for i in range(4)]
    models = {"base": base, **{f"tuned{i}": model for i, model in enumerate(tunes)}}
    models |= {f"t{i}": with_adapter(tunes[i % 4], 110 + i) for i in range(12)}
    reports = [store.add(name, model) for name, model in models.items()]
    # One of each fine-tune is kept whole, but for a few kilobytes at edges.
    assert all(share_of(report) < 0.25 for report in reports[-8:])
    assert all(same_bits(store, name, model) for name, model in models.items())


def test_heads_of_their_own_do_not_hide_an_adapter(store: pydedup.Store) -> None:
    rng = np.random.default_rng(130)

    def heads() -> Model:
        return {f"head{i}": rng.normal(0, 0.02, (64, 64)).astype("f4") for i in range(6)}

    base = small()
    store.add("base", heads() | base)
    for number in range(3):
        own = heads()
        report = store.add(f"t{number}", own | with_adapter(base, 131 + number))
        beside = report.stored_bytes - sum(head.nbytes for head in own.values())
        assert beside < 0.085 * report.logical_bytes


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_two_states_of_each_fine_tune_are_deltas_on_the_base(
    store: pydedup.Store, dtype: DType
) -> None:
    """What one relative would save is not taken to be what all would."""
    rng = np.random.default_rng(140)
    base = {f"l{i}": rng.normal(0, 0.02, (96, 128)).astype("f4") for i in range(4)}
    base = {name: weight.astype(dtype.numpy) for name, weight in base.items()}
    store.add("base", base)
    policy = policies.Bounded(0.001)
    for number in range(14):
        model = tuned(base, 141 + number)
        later = tuned(model, 161 + number, rows=0.03)
        for name, state in (("best", model), ("last", later)):
            report = store.add(f"{name}{number}", state, policy=policy)
            assert share_of(report) < 0.4


def test_small_tensors_that_were_all_trained_do_not_speak_for_large_ones(
    store: pydedup.Store,
) -> None:
    rng = np.random.default_rng(180)
    # So many that they are matched before the large one.
    first = {f"a{i:02}": rng.normal(0, 0.02, (200, 300)).astype("f4") for i in range(18)}
    large = {"z": rng.normal(0, 0.02, (1024, 256)).astype("f4")}
    store.add("m", first | large)
    large = tuned(large, 181)
    store.add("m", tuned(first, 182) | large)
    taken = []
    for number in range(4):
        large = tuned(large, 183 + number, rows=0.03)
        report = store.add("m", tuned(first, 190 + number) | large, policy=LOSSLESS)
        taken.append(report.stored_bytes)
    # The large one was kept whole once, and is small then.
    size = large["z"].nbytes
    assert min(taken[1:]) < max(taken) - 0.6 * size
    assert taken[-1] < taken[0] - 0.2 * size


def test_factors_that_nobody_looks_for_make_nothing_a_base(store: pydedup.Store) -> None:
    """Tensors of a few rows have no factors: tenants' are not nearer to each other than to all."""
    rng = np.random.default_rng(200)
    shapes = [(8, 256), (256, 8)] * 8
    base = {f"l{i}": rng.normal(0, 0.02, s).astype("f4") for i, s in enumerate(shapes)}
    region = tuned(base, 201)
    store.add("base", base)
    first = share_of(store.add("region", region))
    for number in range(4):
        report = store.add(f"t{number}", with_adapter(region, 202 + number))
        assert share_of(report) < 1.1 * first


def test_small_tensors_that_were_all_trained_do_not_hide_an_adapter_in_a_large_one(
    store: pydedup.Store,
) -> None:
    rng = np.random.default_rng(210)
    first = {f"a{i:02}": rng.normal(0, 0.02, (256, 250)).astype("f4") for i in range(17)}
    large = {"z": rng.normal(0, 0.02, (1024, 256)).astype("f4")}
    store.add("base", first | large)
    trained = tuned(first, 211)
    alone = store.add("trained", trained | large).stored_bytes
    report = store.add("m", trained | adapted(large, 4, 212))
    assert report.stored_bytes < 0.1 * large["z"].nbytes
    assert store.add("n", tuned(first, 213) | adapted(large, 4, 214)).stored_bytes < (
        alone + 0.1 * large["z"].nbytes
    )


@pytest.mark.parametrize("shape", [(256, 256), (512, 640)], ids=str)
def test_adapters_of_a_rank_that_two_do_not_share_make_no_bases(
    store: pydedup.Store, shape: tuple[int, int]
) -> None:
    """One is near to its fine-tune; two of its tenants differ by a rank that is not low."""
    rng = np.random.default_rng(220)
    base = {f"l{i}": rng.normal(0, 0.02, shape).astype("f4") for i in range(2)}
    region = tuned(base, 221)
    store.add("base", base)
    first = share_of(store.add("region", region))
    rank = 24 if shape[0] == 256 else 64
    for number in range(4):
        report = store.add(f"t{number}", with_adapter(region, 222 + number, rank))
        assert share_of(report) < 1.1 * first
