# SPDX-License-Identifier: Apache-2.0
"""What policies promise and certificates say: of new versions too, and whatever users' code does.

Synthetic weights: a matrix, and a copy that every weight moved a little of, as a fine-tune does.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies, registry
from pydedup.certificates import describe, error_of
from pydedup.errors import ArgumentError, ConflictError, DuplicateError
from pydedup.policies import Policy
from pydedup.store import Store
from pydedup.testing.faults import Fault, inject

Model = dict[str, NDArray[Any]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[pydedup.Store]:
    with pydedup.open(tmp_path / "store.db") as opened:
        yield opened


def weights() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)


def moved(array: NDArray[np.float32], by: float = 0.01) -> NDArray[np.float32]:
    noise = np.random.default_rng(1).standard_normal(array.shape)
    return (array + by * noise).astype(np.float32)


def same(got: Mapping[str, NDArray[Any]], want: Model) -> bool:
    return all(got[name].tobytes() == array.tobytes() for name, array in want.items())


def good(_: Mapping[str, NDArray[Any]]) -> float:
    return 1.0


def away(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The relative L2 distance of one block, in f64."""
    wide = a.astype(np.float64)
    return float(np.linalg.norm(wide - b) / np.linalg.norm(wide))


# ---- bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [policies.Bounded, lambda e: policies.Accuracy(good, 1.0, max_rel_error=e)]
)
def test_what_is_shared_is_within_the_bound_to_the_last_digit(
    store: pydedup.Store, policy: Callable[[float], Policy]
) -> None:
    """Distances are sums in f32, which for these are too small by 8e-7 of themselves."""
    near = np.full((64, 64), 1.2725753, np.float32)
    near[::2] *= -1
    source = (near * np.float32(1.1)).astype(np.float32)
    bound = away(source, near) * (1 - 4e-7)
    store.add("near", {"w": near}, block_shape=(64, 64))
    store.add("m", {"w": source}, policy=policy(bound), block_shape=(64, 64))
    assert away(source, store.load("m")["w"]) <= bound


def test_recorded_errors_are_not_below_the_true_ones(store: pydedup.Store) -> None:
    near = np.full((64, 64), 1.2725753, np.float32)
    near[::2] *= -1
    source = (near * np.float32(1.1)).astype(np.float32)
    store.add("near", {"w": near}, block_shape=(64, 64))
    for policy in (policies.Bounded(0.1), policies.Accuracy(good, 1.0, max_rel_error=0.1)):
        report = store.add("m", {"w": source}, policy=policy, block_shape=(64, 64))
        recorded = report.certificate["largest_block_error"]
        true = away(source, store.load("m")["w"])
        assert true == pytest.approx(1 / 11)
        assert true * (1 - 1e-12) <= recorded <= true * (1 + 1e-5)


def test_no_block_of_another_dtype_is_shared_within_a_bound(store: pydedup.Store) -> None:
    source = weights().astype(ml_dtypes.bfloat16)
    store.add("near", {"w": weights()}, block_shape=(64, 64))
    store.add("m", {"w": source}, policy=policies.Bounded(0.05), block_shape=(64, 64))
    assert store.verify().errors == []
    loaded = store.load("m")["w"]
    assert loaded.dtype == source.dtype
    assert away(source, loaded.astype(np.float64)) <= 0.05


def test_errors_of_tensors_that_were_not_recorded_one_by_one() -> None:
    """As in certificates of early stores."""
    assert error_of({"policy": "bounded", "largest_block_error": 0.002}, "w") == 0.002
    assert error_of({"policy": "bounded"}, "w") == 0.0


def test_no_recorded_error_is_beyond_the_bound(store: pydedup.Store) -> None:
    """Of 400 quantised deltas one is so close to it that rounding its error up goes beyond."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal((400 * 32, 32)).astype(np.float32)
    near = (base * (1 + 0.02 * rng.standard_normal(base.shape))).astype(np.float32)
    store.add("base", {"w": base}, block_shape=(32, 32))
    report = store.add("m", {"w": near}, policy=policies.Bounded(0.001), block_shape=(32, 32))
    assert report.delta_blocks == 400
    assert 0.001 * (1 - 1e-6) < report.certificate["largest_block_error"] <= 0.001


def test_equal_blocks_of_two_tensors_have_one_error(store: pydedup.Store) -> None:
    """Only one of them is compared; a stricter version must not take the other for exact."""
    source = moved(weights())
    longer = np.concatenate([source, weights()[::-1]])
    models = {"a": source, "b": longer}
    store.add("near", {"w": weights()}, block_shape=(64, 64))
    report = store.add("m", models, policy=policies.Bounded(0.1), block_shape=(64, 64))
    errors = report.certificate["tensor_errors"]
    assert errors["a"] == errors["b"] > 0.005
    store.add("m", models, policy=policies.Bounded(0.001), block_shape=(64, 64))
    for name, array in store.load("m").items():
        for top in range(0, len(array), 64):
            assert away(models[name][top : top + 64], array[top : top + 64]) <= 0.001


def test_weights_that_span_all_of_f64_can_be_searched(store: pydedup.Store) -> None:
    """Their range is infinite: numpy warned of it."""
    wide = weights().astype(np.float64) * 1e307
    wide[:2] = [[1.7e308], [-1.7e308]]
    store.add("m", {"w": wide})
    report = store.add("m", {"w": wide * 0.999}, policy=policies.Accuracy(good, 1.0))
    assert report.certificate["replaced"] > 0
    assert away(wide / 1e300, store.load("m")["w"] / 1e300) < 0.002


# ---- bits ---------------------------------------------------------------------------------------


def other_zeros() -> tuple[Model, Model]:
    base = weights()[:64]
    base[3] = 0.0
    pruned = base.copy()
    pruned[3] = -0.0  # as weights times a mask become
    return {"w": base}, {"w": pruned}


def underflow() -> tuple[Model, Model]:
    base = weights()[:64].astype(np.float64)
    base[0, 0] = 5e-324
    other = base.copy()
    other[0, 0] = 0.0
    return {"w": base}, {"w": other}


@pytest.mark.parametrize("models", [other_zeros, underflow])
@pytest.mark.parametrize("before", [policies.Bounded(0.01), policies.Accuracy(good, 0.1)])
@pytest.mark.parametrize("after", [policies.Exact(), policies.Lossless()])
def test_a_version_keeps_its_bits_after_one_that_did_not(
    store: pydedup.Store, models: Any, before: Policy, after: Policy
) -> None:
    base, model = models()
    store.add("base", base, policy=policies.Exact())
    lossy = store.add("m", model, policy=before)
    assert lossy.certificate["largest_block_error"] == 0  # which is not to say the same bits
    assert not same(store.load("m@1"), model)
    store.add("m", model, policy=after)
    assert same(store.load("m@2"), model)
    assert store.verify().errors == []


def test_a_version_after_a_lossy_one_takes_what_its_bound_allows(store: pydedup.Store) -> None:
    """Tensor by tensor: one that was near enough says nothing of the others."""
    base, exact = weights(), weights()[:64] * 3
    store.add("base", {"a": base, "b": exact}, policy=policies.Exact())
    model = {"a": moved(base, 0.04), "b": exact}
    for bound in (0.05, 0.05, 0.01):
        store.add("m", model, policy=policies.Bounded(bound))
    for version in (1, 2):
        errors = store.info(f"m@{version}").certificate["tensor_errors"]
        assert list(errors) == ["a"]
        assert 0.03 < errors["a"] <= 0.05
    assert store.info("m@3").certificate["largest_block_error"] <= 0.01
    assert np.linalg.norm(store.load("m@3")["a"] - model["a"]) <= 0.01 * np.linalg.norm(model["a"])


# ---- policies of users --------------------------------------------------------------------------


class Mine:
    name = "mine"
    compresses = uses_deltas = True
    max_rel_error = 0.05

    def __init__(self, **parameters: Any) -> None:
        self._parameters = parameters

    def parameters(self) -> Mapping[str, Any]:
        return self._parameters


def test_a_policy_of_the_users_own_may_be_lossy(store: pydedup.Store) -> None:
    base = weights()
    store.add("base", {"w": base})
    report = store.add("m", {"w": moved(base)}, policy=Mine(level=3))
    assert report.certificate["largest_block_error"] > 0
    assert "not the same bits" in describe(report.certificate)[0]
    assert store.verify().errors == []
    store.add("m", {"w": moved(base)})
    assert same(store.load("m@2"), {"w": moved(base)})


def test_parameters_that_are_not_json_are_refused(store: pydedup.Store) -> None:
    with pytest.raises(ArgumentError, match=r"parameters\(\) of .* are not JSON"):
        store.add("m", {"w": weights()}, policy=Mine(level=np.float32(1)))
    assert store.models() == []


@pytest.mark.parametrize("name", ["policy", "same_bits", "largest_block_error", "tensor_errors"])
def test_parameters_of_names_that_certificates_use_are_refused(
    store: pydedup.Store, name: str
) -> None:
    with pytest.raises(ArgumentError, match="without the names that certificates have anyway"):
        store.add("m", {"w": weights()}, policy=Mine(**{name: 5}))
    assert store.models() == []


def test_parameters_that_are_no_mapping_are_refused(store: pydedup.Store) -> None:
    policy = Mine()
    policy._parameters = []
    with pytest.raises(ArgumentError, match=r"parameters\(\) of .* must be a mapping"):
        store.add("m", {"w": weights()}, policy=policy)
    assert store.models() == []


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("name", "accuracy", "the name of .* none of bounded, accuracy"),
        ("name", 3, "the name of .* must be text"),
        ("name", "\ud800", "the name of .* no valid Unicode"),
        ("max_rel_error", "0.1", "max_rel_error of .* must be a number"),
        ("max_rel_error", None, "max_rel_error of .* must be a number"),
        ("max_rel_error", float("nan"), "max_rel_error of .* must be finite"),
        ("max_rel_error", -1, "max_rel_error of .* must be 0 or more"),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused(
    store: pydedup.Store, part: str, value: object, says: str
) -> None:
    policy = Mine()
    setattr(policy, part, value)
    with pytest.raises(ArgumentError, match=says):
        store.add("m", {"w": weights()}, policy=policy)
    assert store.models() == []


def test_the_error_of_a_policy_may_be_a_number_of_numpy(store: pydedup.Store) -> None:
    policy = Mine()
    policy.max_rel_error = np.float32(0.05)
    store.add("m", {"w": weights()}, policy=policy)
    assert store.info("m").certificate["same_bits"] is False


@pytest.mark.parametrize(
    ("certificate", "said"),
    [
        ({"policy": "exact", "max_rel_error": 0.0}, "the same bits"),
        ({"policy": "lossless", "max_rel_error": 0.0}, "the same bits"),
        ({"policy": "bounded", "max_rel_error": 0.01, "largest_block_error": 0.002}, "within 0.01"),
        ({"policy": "mine", "largest_block_error": 0.002}, "not the same bits"),
        # What none is beyond is rounded up.
        (
            {"policy": "mine", "largest_block_error": 0.00102161},
            "not the same bits: no block is farther away than 0.00103 ",
        ),
        (
            {"policy": "mine", "largest_block_error": 0.001},
            "not the same bits: no block is farther away than 0.001 ",
        ),
    ],
)
def test_certificates_that_do_not_say_same_bits(certificate: dict[str, Any], said: str) -> None:
    """Those of earlier versions: then it is what the policy promises."""
    (line,) = describe(certificate)
    assert said in line
    assert ("not" in line) == ("not" in said)


# ---- evaluate -----------------------------------------------------------------------------------


def test_an_evaluate_that_loads_into_the_model_that_is_added(store: pydedup.Store) -> None:
    torch = pytest.importorskip("torch")
    base = weights()
    store.add("base", {"weight": base}, policy=policies.Exact())
    module = torch.nn.Linear(64, 256, bias=False)
    original = moved(base)
    module.load_state_dict({"weight": torch.from_numpy(original.copy())})

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        module.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in arrays.items()})
        return 1.0

    report = store.add("m", module, policy=policies.Accuracy(evaluate, 0.1))
    stored = store.load("m")["weight"]
    error = np.linalg.norm(stored - original) / np.linalg.norm(original)
    assert report.certificate["replaced"] > 0
    assert report.certificate["largest_block_error"] >= 0.9 * error > 0
    store.add("m", {"weight": original}, policy=policies.Exact())
    assert same(store.load("m@2"), {"weight": original})
    assert store.verify().errors == []


def test_a_source_that_finetuning_changed_is_noticed(store: pydedup.Store) -> None:
    base = weights()
    store.add("base", {"w": base}, policy=policies.Exact())
    source = {"w": moved(base), "free": np.zeros((8, 8), np.float32)}

    def finetune(
        arrays: Mapping[str, NDArray[Any]], _: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        source["free"] += 1
        return {**arrays, "free": arrays["free"] + 1}

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        return 1.0 + float(arrays["free"].sum())

    with pytest.raises(ConflictError, match=r"'free' of the source of m@1 changed"):
        store.add("m", source, policy=policies.Accuracy(evaluate, 0.1, finetune=finetune))
    assert [info.name for info in store.models()] == ["base"]


@pytest.mark.parametrize(
    ("dtype", "bits"), [(ml_dtypes.bfloat16, 0x7F81), (np.float32, 0x7F800001)]
)
def test_signalling_nans_are_searched_and_compared(
    store: pydedup.Store, dtype: Any, bits: int
) -> None:
    """Numpy warned of them."""

    def finetune(
        arrays: Mapping[str, NDArray[Any]], _: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        trained = arrays["w"].copy()
        trained[0, 1] = 0  # in the block that has one, which is not replaced
        return {"w": trained, "n": arrays["n"] + 1}

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        return float(arrays["n"].sum())

    weight = weights().astype(dtype)
    odd = moved(weights()).astype(dtype)
    odd.view(f"u{odd.itemsize}")[0, 0] = bits
    store.add("near", {"w": weight})
    policy = policies.Accuracy(evaluate, 0.1, finetune=finetune)
    report = store.add("m", {"w": odd, "n": np.zeros(2)}, policy=policy, block_shape=(64, 64))
    assert report.certificate["tensor_errors"]["w"] == 1.0  # of a NaN, which is no number away
    assert not store.diff("m", "near").same


@pytest.mark.parametrize("trained", [False, True])
def test_tied_tensors_have_the_same_error(store: pydedup.Store, trained: bool) -> None:
    def finetune(
        arrays: Mapping[str, NDArray[Any]], masks: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        more = np.where(masks["w"], arrays["w"], arrays["w"] + 1)
        return {"w": more}  # tied, too, which is the same array

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        return float(arrays["w"][200:].mean())  # blocks that nothing is near to

    source = moved(weights())
    source[128:] = np.random.default_rng(7).standard_normal((128, 64))
    policy = policies.Accuracy(evaluate, 0.1, finetune=finetune if trained else None)
    store.add("near", {"w": weights()})
    tied = {"w": source, "tied": source}
    certificate = store.add("m", tied, policy=policy, block_shape=(64, 64)).certificate
    assert certificate["finetuned"] == trained
    errors = certificate["tensor_errors"]
    assert errors["w"] == errors["tied"] > (0.5 if trained else 0.005)


def test_what_is_refused_after_training_stays_as_it_was_trained(store: pydedup.Store) -> None:
    """It was refused before, too: what is put back is not what it was then."""
    near = weights()[:128]
    source = moved(near, 1e-4)
    trained = source.copy()
    trained[64:] += 1

    def finetune(
        arrays: Mapping[str, NDArray[Any]], masks: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        assert masks["w"][:64].all()  # shared
        return {"w": np.where(masks["w"], arrays["w"], trained)}

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        block = arrays["w"][64:]
        return 2.0 * np.array_equal(block, trained[64:]) + np.array_equal(block, source[64:])

    store.add("near", {"w": near}, block_shape=(64, 64))
    policy = policies.Accuracy(evaluate, 0.5, finetune=finetune)
    report = store.add("m", {"w": source}, policy=policy, block_shape=(64, 64))
    assert (report.certificate["refused"], report.certificate["metric_after"]) == (1, 2.0)
    loaded = store.load("m")
    assert np.array_equal(loaded["w"][:64], near[:64])
    assert np.array_equal(loaded["w"][64:], trained[64:])


def test_the_certificate_of_trained_zeros_is_json(store: pydedup.Store) -> None:
    """Biases begin as zeros, and what training made of them is infinitely far by their norm."""

    def finetune(
        arrays: Mapping[str, NDArray[Any]], _: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        return {**arrays, "bias": arrays["bias"] + 0.5}

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        return float(arrays["bias"].sum())

    source = {"w": weights(), "bias": np.zeros(2048, np.float32)}
    store.add("m", source, policy=policies.Accuracy(evaluate, 0.1, finetune=finetune))
    certificate = store.info("m").certificate
    assert certificate["finetuned"]
    assert certificate["tensor_errors"] == {"bias": 1.0}
    json.dumps(dict(certificate), allow_nan=False)
    store.add("m", source, policy=policies.Bounded(0.9))
    assert not store.load("m")["bias"].any()


@pytest.mark.parametrize("dtype", ["i8", "u1", "?", "f2", "f8", ml_dtypes.float8_e4m3fn])
def test_whatever_training_changed_is_stored(store: pydedup.Store, dtype: Any) -> None:
    """Batch normalisation counts its batches in an integer."""

    def finetune(
        arrays: Mapping[str, NDArray[Any]], _: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        return {**arrays, "n": np.zeros_like(arrays["n"])}

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        return -float(arrays["n"].astype(np.float64).sum())

    source = {"w": weights(), "n": np.ones((3, 5), dtype)}
    store.add("m", source, policy=policies.Accuracy(evaluate, 0.1, finetune=finetune))
    assert store.info("m").certificate["tensor_errors"] == {"n": 1.0}
    assert not store.load("m")["n"].any()
    store.add("m", source, policy=policies.Bounded(0.9))
    assert same(store.load("m"), source)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_a_version_after_one_whose_squares_leave_the_range(
    store: pydedup.Store, scale: float
) -> None:
    base = weights().astype(np.float64)
    model = {"w": moved(weights(), 0.05).astype(np.float64) * scale}
    store.add("base", {"w": base * scale})
    lossy = store.add("m", model, policy=policies.Accuracy(lambda _: 1.0, 0.1))
    assert 0.04 < lossy.certificate["largest_block_error"] < 0.06
    store.add("m", model, policy=policies.Bounded(0.01))
    away = np.linalg.norm((store.load("m")["w"] - model["w"]) / scale)
    assert away <= 0.01 * np.linalg.norm(model["w"] / scale)


def test_a_source_that_changed_before_a_second_attempt_is_noticed(store: pydedup.Store) -> None:
    """Another writer removes what the add is compared with, so it reads its source once more."""
    base = weights()
    store.add("base", {"w": base}, policy=policies.Exact())
    source = {"w": moved(base)}
    attempts = 0

    def evaluate(arrays: Mapping[str, NDArray[Any]]) -> float:
        nonlocal attempts
        attempts += 1
        if attempts == 4:
            source["w"][:] = arrays["w"]
            store.remove("base")
            store.vacuum()
        return 1.0

    with pytest.raises(ConflictError, match=r"'w' of the source of m@1 changed"):
        store.add("m", source, policy=policies.Accuracy(evaluate, 0.1, every=1))
    assert store.models() == []


def test_what_progress_raises_is_not_laid_to_evaluate(store: pydedup.Store) -> None:
    class StopNowError(Exception):
        pass

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "evaluating":
            raise StopNowError

    with pytest.raises(StopNowError):
        store.add("m", {"w": weights()}, policy=policies.Accuracy(good, 0.1), progress=progress)
    assert store.models() == []


# ---- versions and metadata ----------------------------------------------------------------------


def test_adds_at_once_without_a_version_each_get_one(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with pydedup.open(url) as store:
        failed: list[BaseException] = []
        barrier = threading.Barrier(4)

        def add(number: int) -> None:
            try:
                barrier.wait()
                store.add("m", {"w": weights() + number})
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert sorted(info.version for info in store.versions("m")) == ["1", "2", "3", "4"]
        stored = {float(store.load(f"m@{v}")["w"][0, 0] - weights()[0, 0]) for v in "1234"}
        assert len(stored) == 4
        assert store.verify().errors == []


def test_a_number_taken_while_an_add_was_staged_is_passed_over(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with pydedup.open(url) as others:

        def overtake() -> None:
            others.add("m", {"w": weights() * 2})

        fault = Fault("commit", overtake, 1, after=True)  # of what is staged
        adapter, _ = inject(registry.connect(url, mode="a"), fault)
        with Store(adapter, 1 << 26) as store:
            assert store.add("m", {"w": weights()}).model == "m@2"
        assert same(others.load("m@2"), {"w": weights()})
        assert same(others.load("m@1"), {"w": weights() * 2})
        assert others.verify().errors == []


def test_a_version_that_was_asked_for_is_not_passed_over(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with pydedup.open(url) as others:
        fault = Fault("commit", lambda: others.add("m@1", {"w": weights()}) and None, 1, after=True)
        adapter, _ = inject(registry.connect(url, mode="a"), fault)
        with Store(adapter, 1 << 26) as store, pytest.raises(DuplicateError, match="add another"):
            store.add("m@1", {"w": weights() * 2})
        assert same(others.load("m"), {"w": weights()})


@pytest.mark.parametrize("value", ["\ud800", [[]]])
def test_metadata_that_cannot_be_kept_is_refused(store: pydedup.Store, value: Any) -> None:
    for _ in range(5000 if isinstance(value, list) else 0):
        value = [value]
    with pytest.raises(ArgumentError, match="metadata of m@1 is not JSON"):
        store.add("m", {"w": weights()}, metadata={"a": value}, dry_run=True)


@pytest.mark.parametrize("value", [42, True, 1.5])
def test_a_quota_of_a_number_is_that_of_its_models(store: pydedup.Store, value: Any) -> None:
    assert store.quotas.set("tenant", value, 1).value == str(value).lower()
    store.quotas.set("tenant", "acme", "1GB")
    with pytest.raises(pydedup.errors.QuotaError, match="tenant="):
        store.add("a", {"w": weights()}, metadata={"tenant": value})
    store.add("b", {"w": weights()})
    store.quotas.remove("tenant", value)
    store.add("a", {"w": weights()}, metadata={"tenant": value})


def test_quotas_of_numbers_that_early_stores_have_hold(store: pydedup.Store) -> None:
    old = '[{"key": "tenant", "value": 42, "bytes": 1, "measure": "marginal"}]'
    adapter = store._adapter
    with adapter.transaction():
        adapter.set_meta("quotas", old)
    assert [quota.value for quota in store.quotas] == ["42"]
    with pytest.raises(pydedup.errors.QuotaError):
        store.add("a", {"w": weights()}, metadata={"tenant": 42})


@pytest.mark.parametrize(("key", "value"), [(3, "x"), ("a", object()), ("\ud800", "x")])
def test_quotas_that_no_model_can_meet_are_refused(
    store: pydedup.Store, key: Any, value: Any
) -> None:
    with pytest.raises(ArgumentError):
        store.quotas.set(key, value, 1)
    assert list(store.quotas) == []
