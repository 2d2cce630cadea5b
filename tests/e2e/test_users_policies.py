# SPDX-License-Identifier: Apache-2.0
"""Policies of users' own, versions and metadata: what is kept of them, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import registry
from pydedup.certificates import describe
from pydedup.errors import ArgumentError, DuplicateError
from pydedup.store import Store
from pydedup.testing.faults import Fault, inject

from .relatives import moved, same_bits, weights

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
    assert same_bits(store, "m@2", {"w": moved(base)})


def nested(value: Any, deep: int) -> Any:
    for _ in range(deep):
        value = [value]
    return value


@pytest.mark.parametrize("level", [np.float32(1), nested(0, 600), nested(0, 5000)])
def test_parameters_that_are_not_json_are_refused(store: pydedup.Store, level: Any) -> None:
    with pytest.raises(ArgumentError, match=r"parameters\(\) of .* are not JSON"):
        store.add("m", {"w": weights()}, policy=Mine(level=level))
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
        (
            {"policy": "bounded", "max_rel_error": 0.01, "largest_block_error": 0.002},
            "at most 0.01 of its norm; measured: by at most 0.002",
        ),
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
        assert same_bits(others, "m@2", {"w": weights()})
        assert same_bits(others, "m@1", {"w": weights() * 2})
        assert others.verify().errors == []


def test_a_version_that_was_asked_for_is_not_passed_over(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with pydedup.open(url) as others:
        fault = Fault("commit", lambda: others.add("m@1", {"w": weights()}) and None, 1, after=True)
        adapter, _ = inject(registry.connect(url, mode="a"), fault)
        with Store(adapter, 1 << 26) as store, pytest.raises(DuplicateError, match="add another"):
            store.add("m@1", {"w": weights() * 2})
        assert same_bits(others, "m", {"w": weights()})


@pytest.mark.parametrize(("value", "deep"), [("\ud800", 0), ([[]], 5000), ('[{"[\\', 500)])
def test_metadata_that_cannot_be_kept_is_refused(
    store: pydedup.Store, value: Any, deep: int
) -> None:
    """Newer Pythons write JSON that 3.11 does not read."""
    if deep == 500:
        store.add("m@0", {"w": weights()}, metadata={"a": nested(value, deep - 1)})
        assert store.info("m@0").info.metadata == {"a": nested(value, deep - 1)}
    value = nested(value, deep)
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
