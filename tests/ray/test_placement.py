# SPDX-License-Identifier: Apache-2.0
"""Which replica is the home of which family, and which models are one. Without Ray."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.opening import connect_store
from pydedup.ray.serving.families import Families, group
from pydedup.ray.serving.placement import Placement, key_of, weight_of

NONE: dict[str, set[str]] = {"a": set(), "b": set(), "c": set()}


def test_key_tells_the_size_and_stays_while_a_family_grows_a_little() -> None:
    assert weight_of(key_of("m@1", 5 << 20)) == 8 << 10
    assert key_of("m@1", (5 << 20) + 1) == key_of("m@1", 8 << 20) != key_of("m@1", (8 << 20) + 1)
    assert weight_of(key_of("m~7KiB@2", 0)) == weight_of("m") == 1


def test_homes_are_even_by_size() -> None:
    placement = Placement()
    keys = [key_of("large", 64 << 20), *(key_of(f"small{n}", 1 << 20) for n in range(128))]
    loads = Counter[str]()
    for key in keys:
        loads[placement.home(key, NONE)] += weight_of(key)
    assert max(loads.values()) - min(loads.values()) <= 1024  # the size of a small one


def test_a_replica_that_dies_moves_its_own_families_alone() -> None:
    placement = Placement()
    keys = [key_of(f"m{n}", 1 << 20) for n in range(30)]
    before = {key: placement.home(key, NONE) for key in keys}
    left = {name: NONE[name] for name in ("a", "c")}
    after = {key: placement.home(key, left) for key in keys}
    assert all(after[key] == home for key, home in before.items() if home != "b")
    assert Counter(after.values()) == {"a": 15, "c": 15}


def test_a_new_replica_gets_its_part_and_no_other_family_moves() -> None:
    placement = Placement()
    keys = [key_of(f"m{n}", 1 << 20) for n in range(30)]
    two = {name: NONE[name] for name in ("a", "b")}
    before = {key: placement.home(key, two) for key in keys}
    # Where they were says nothing against moving them.
    three = {"a": set(keys), "b": set(keys), "c": set[str]()}
    after = {key: placement.home(key, three) for key in keys}
    assert {home for key, home in after.items() if home != before[key]} == {"c"}
    assert Counter(after.values()) == {"a": 10, "b": 10, "c": 10}


def test_routers_agree() -> None:
    first, second = Placement(), Placement()
    keys = [key_of(f"m{n}", 1 << 20) for n in range(20)]
    held: dict[str, set[str]] = {"a": set(), "b": set()}
    for key in keys:
        held[first.home(key, held)].add(key)
    for key in reversed(keys):  # in another order: by what replicas say they have
        assert second.home(key, held) == first.home(key, held)


def test_models_without_common_pages_are_apart() -> None:
    used = [{1: 10, 2: 10}, {3: 10}, {2: 10, 4: 5}, {3: 10, 5: 10}]
    found = {frozenset(members): nbytes for members, nbytes in group(used, 1000)}
    assert found == {frozenset({0, 2}): 25, frozenset({1, 3}): 20}
    assert group([], 10) == []


def test_a_family_that_is_too_large_is_cut_where_little_is_shared() -> None:
    # Two tight families of four, which have one page in common.
    used = [{0: 1, 1 + n // 4: 60, 10 + n: 10} for n in (0, 4, 1, 5, 2, 6, 3, 7)]
    whole = group(used, 1000)
    assert [(sorted(members), nbytes) for members, nbytes in whole] == [(list(range(8)), 201)]
    cut = {frozenset(members): nbytes for members, nbytes in group(used, 150)}
    assert cut == {frozenset({0, 2, 4, 6}): 101, frozenset({1, 3, 5, 7}): 101}
    assert len(group(used, 1)) == 8


def test_many_variants_of_one_base_are_cut_evenly() -> None:
    used = [{0: 100, n + 1: 10} for n in range(300)]
    sizes = [len(members) for members, _ in group(used, 600)]
    assert sum(sizes) == 300
    assert min(sizes[:-1]) > 20


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'm.db'}"
    rng = np.random.default_rng(0)
    with pydedup.open(url) as store:
        for name in ("red", "blue"):
            base = {f"w{n}": rng.standard_normal((256, 256), np.float32) for n in range(4)}
            store.add(f"{name}@1", base)
            store.add(f"{name}-tuned@1", {**base, "w0": base["w0"] + 1})
        store.alias("red", "prod", "1")
    return url


def test_families_follow_the_store(url: str) -> None:
    adapter = connect_store(url, mode="r")
    families = Families(adapter, 1 << 30)
    assert families.refresh()
    assert not families.refresh()
    red = families.key("red")
    assert red.startswith("red@1~")
    assert {families.key(name) for name in ("red@1", "red@prod", "red-tuned")} == {red}
    assert families.key("blue-tuned@1") == families.key("blue") != red
    assert families.key("none@7") == families.key("none") == "none~1KiB"
    with pydedup.open(url) as store:
        changed = {"w": np.random.default_rng(7).standard_normal((300, 300), np.float32)}
        store.add("red@2", changed)
        store.alias("red", "prod", "2")
        assert families.refresh()
        assert families.key("red") == families.key("red@prod") != red == families.key("red@1")
        store.remove("red@1")
    assert families.refresh()
    assert families.key("red-tuned").startswith("red-tuned@1~")
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as damaged, damaged:
        change = "UPDATE pydedup_models SET policy = CAST(x'ff' AS TEXT) WHERE name = 'blue'"
        assert damaged.execute(change).rowcount == 1
    assert families.refresh()  # all others are placed
    assert families.key("blue-tuned").startswith("blue-tuned@1~")
    adapter.close()
