# SPDX-License-Identifier: Apache-2.0
"""Copies and restores into stores whose quotas do not allow all that would come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.errors import QuotaError
from pydedup.words import Measure

New = Callable[[str], str]


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    """Three models of a tenant, which share a half, and one of another."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((256, 256)).astype(np.float32)
    with pydedup.open(f"sqlite:///{tmp_path / 'source.db'}") as store:
        for name, tenant in (("a", "acme"), ("b", "acme"), ("other", "other"), ("c", "acme")):
            own = rng.standard_normal((256, 256)).astype(np.float32)
            weights = {"own": own, "shared": shared}
            if name == "other":
                weights.pop("shared")
            store.add(name, weights, metadata={"tenant": tenant})
        store.backup(tmp_path / "models.backup")
    return tmp_path / "models.backup"


@pytest.mark.parametrize("backend", ["sqlite", "postgres", "mysql"])
@pytest.mark.parametrize(
    ("measure", "too_little", "enough"),
    # 256 KiB each: six matrices, of which four are different; compressed, they take a little less.
    [("logical", "1535KiB", "1536KiB"), ("marginal", "700KiB", "1100KiB")],
)
def test_a_restore_that_a_quota_does_not_allow_writes_nothing(
    backup: Path, new_store: New, backend: str, measure: str, too_little: str, enough: str
) -> None:
    """The first models were there, and the error named none."""
    with pydedup.open(new_store(backend)) as store:
        store.quotas.set("tenant", "acme", too_little, measure=measure)
        with pytest.raises(QuotaError, match="with a copy of 4 models, tenant=acme would take"):
            store.restore(backup)
        stats = store.stats()
        assert (stats.models, stats.pages, stats.retired_pages) == (0, 0, 0)
        store.quotas.set("tenant", "acme", enough, measure=measure)
        store.restore(backup)
        assert [model.name for model in store.models()] == ["a", "b", "c", "other"]
        assert store.verify().errors == []


def test_a_copy_beside_others_is_refused_before_what_is_known_then(
    backup: Path, new_store: New
) -> None:
    """What models share with those that are there is known when they come; then one is named."""
    url = new_store("sqlite")
    with pydedup.open(url) as store, pydedup.open(f"sqlite:///{backup}", mode="r") as source:
        store.add("mine", {"w": np.ones(9)}, metadata={"tenant": "acme"})
        store.quotas.set("tenant", "acme", "1MiB", measure="logical")
        with pytest.raises(QuotaError, match="with a copy of 4 models, tenant=acme"):
            source.copy_to(url)
        assert [model.name for model in store.models()] == ["mine"]
        store.quotas.set("tenant", "acme", "500KiB")
        with pytest.raises(QuotaError, match="with a copy of b@1, tenant=acme"):
            source.copy_to(url)
        assert [model.name for model in store.models()] == ["a", "mine"]
        source.copy_to(url, ["other"])
        store.quotas.set("tenant", "acme", "1100KiB")
        assert source.copy_to(url).copied == 2


def test_a_copy_of_whole_pages_is_called_one(backup: Path, new_store: New) -> None:
    """What these take is known once they are there: then it was called an add."""
    url = new_store("sqlite")
    with pydedup.open(url) as store, pydedup.open(f"sqlite:///{backup}", mode="r") as source:
        store.quotas.set("tenant", "acme", "500KiB")
        assert [model.whole_pages for model in source.copy_to(url, ["a"]).models] == [2]
        with pytest.raises(QuotaError, match="with a copy of b@1, tenant=acme would take"):
            source.copy_to(url, ["b"])


@pytest.mark.parametrize("measure", ["logical", "marginal"])
def test_what_a_copy_replaces_is_not_counted(
    backup: Path, new_store: New, measure: Measure
) -> None:
    url = new_store("sqlite")
    weights = np.random.default_rng(9).standard_normal((2, 256, 256)).astype(np.float32)
    with pydedup.open(url) as store, pydedup.open(f"sqlite:///{backup}", mode="r") as source:
        store.add("a", {"w": weights}, metadata={"tenant": "acme"})
        store.quotas.set("tenant", "acme", "600KiB", measure=measure)
        with pytest.raises(QuotaError, match=r"with a copy of (1 models|b@1)"):
            source.copy_to(url, ["b"])
        assert source.copy_to(url, ["a"], on_conflict="replace").copied == 1
        assert store.load("a").keys() == {"own", "shared"}


def test_what_is_there_already_is_counted_once(backup: Path, new_store: New) -> None:
    url = new_store("sqlite")
    with pydedup.open(url) as store, pydedup.open(f"sqlite:///{backup}", mode="r") as source:
        store.quotas.set("tenant", "acme", "1536KiB", measure="logical")
        for names, copied in ((["a"], 1), (None, 3), (None, 0)):
            assert source.copy_to(url, names).copied == copied
