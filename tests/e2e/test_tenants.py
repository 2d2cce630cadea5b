# SPDX-License-Identifier: Apache-2.0
"""Bytes by a key of metadata, and quotas, on every back end."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup import policies
from pydedup.errors import ArgumentError, NotFoundError, QuotaError, ReadOnlyError
from pydedup.usage import Usage, ValueUsage

Model = dict[str, NDArray[Any]]

#: Rows of a block of the models below: 64 x 64 of float32, and what such a block takes on a page.
SIDE = 64
BLOCK = SIDE * SIDE * 4 + 32


def model(*seeds: int) -> Model:
    """A model of one raw block per seed."""
    parts = [
        np.random.default_rng(seed).standard_normal((SIDE, SIDE)).astype(np.float32)
        for seed in seeds
    ]
    return {"w": np.concatenate(parts)}


def add(store: pydedup.Store, name: str, seeds: range, **metadata: Any) -> None:
    store.add(
        name,
        model(*seeds),
        policy=policies.Exact(),
        block_shape=(SIDE, SIDE),
        metadata=metadata,
    )


def by_value(usage: Usage) -> dict[str | None, ValueUsage]:
    return {value.value: value for value in usage.values}


def contents(store: pydedup.Store) -> Any:
    """What there is, stagings and jobs included."""
    adapter = store._adapter
    return (
        [row.name for row in adapter.models(state=None)],
        [row.id for row in adapter.page_rows()],
        adapter.model_pages(),
        adapter.jobs(),
        adapter.count_blocks(),
        list(store.quotas),
    )


def test_bytes_by_a_key(store_url: str) -> None:
    with pydedup.open(store_url) as store:
        assert store.stats(by="tenant") == Usage("tenant", (), 0)
        add(store, "base", range(40))  # has no tenant
        add(store, "a1", range(50), tenant="a")
        add(store, "a2", range(10, 55), tenant="a")
        add(store, "b1", range(20, 52), tenant="b")  # 12 that a had alone so far
        add(store, "c1", range(60, 67), tenant=7)
        usage = store.stats(by="tenant")
        found = by_value(usage)
        wanted = {
            None: (1, 40, 40, 0),
            "a": (2, 50 + 45, 52, 3),
            "b": (1, 32, 32, 0),
            "7": (1, 7, 0, 7),
        }
        assert {
            value: (of.models, of.logical_bytes, of.shared_bytes, of.marginal_bytes)
            for value, of in found.items()
        } == {
            value: (models, logical * (BLOCK - 32), shared * BLOCK, marginal * BLOCK)
            for value, (models, logical, shared, marginal) in wanted.items()
        }
        assert usage.shared_bytes == 52 * BLOCK
        assert usage.used_bytes == 62 * BLOCK
        assert [value.value for value in usage.values][:2] == ["7", "a"], "largest first"
        # One model per value: what explain says of each.
        add(store, "d1", range(65, 70), tenant="d")
        for name, value in (("b1", "b"), ("c1", "7"), ("d1", "d")):
            explained = store.explain(name)
            of = by_value(store.stats(by="tenant"))[value]
            assert of.used_bytes == explained.used_bytes
            assert of.marginal_bytes == explained.removal_frees_bytes
        # Neither a removal of what is shared nor a vacuum changes what the others have alone.
        before = store.stats(by="tenant")
        store.vacuum()
        assert store.stats(by="tenant") == before
        store.remove("b1")
        store.vacuum()
        left = by_value(store.stats(by="tenant"))
        assert "b" not in left
        assert left["a"].marginal_bytes == 15 * BLOCK
    with pydedup.open(store_url, mode="r") as store:
        assert by_value(store.stats(by="tenant")) == left
        assert [value.value for value in store.stats(by="team").values] == [None]


def test_removing_a_tenant_frees_its_marginal_bytes(store_url: str) -> None:
    with pydedup.open(store_url) as store:
        rng = np.random.default_rng(3)
        base = {"w": rng.standard_normal((1024, 512)).astype(np.float32)}
        store.add("base", base)
        for i in range(3):
            moved = {"w": base["w"] * (1 + 1e-4 * rng.standard_normal((1024, 512)))}
            moved["w"] = moved["w"].astype(np.float32)
            moved["w"][: 100 * i] = rng.standard_normal((100 * i, 512))
            tenant = {"tenant": "x" if i else "y"}
            assert store.add(f"m{i}", moved, metadata=tenant).delta_blocks
        of = by_value(store.stats(by="tenant"))
        for name in ("m1", "m2"):
            store.remove(name)
        after = store.stats(by="tenant")
        assert by_value(after).keys() == {None, "y"}
        total = sum(value.marginal_bytes for value in of.values())
        shared = by_value(after)[None].used_bytes
        assert after.used_bytes == total - of["x"].marginal_bytes + shared
        assert store.verify().ok


@pytest.mark.parametrize("measure", ["marginal", "logical"])
def test_an_add_over_the_quota_changes_nothing(store_url: str, measure: str) -> None:
    with pydedup.open(store_url) as store:
        add(store, "base", range(30))
        add(store, "a1", range(20, 35), tenant="a")
        limit = 10 * BLOCK if measure == "marginal" else 25 * (BLOCK - 32)
        store.quotas.set("tenant", "a", limit, measure=measure)
        before = contents(store)
        for dry_run in (True, False):
            with pytest.raises(QuotaError) as caught:
                store.add(
                    "a2",
                    model(*range(25, 41)),
                    policy=policies.Exact(),
                    block_shape=(SIDE, SIDE),
                    metadata={"tenant": "a"},
                    dry_run=dry_run,
                )
            took = 11 * BLOCK if measure == "marginal" else 31 * (BLOCK - 32)
            assert f"tenant=a would take {took:,} bytes ({measure})" in str(caught.value)
            assert f"its quota of {limit:,}" in str(caught.value)
            assert contents(store) == before
        add(store, "other", range(100, 150), tenant="b")
        add(store, "none", range(200, 250))
        add(store, "a2", range(30, 40), tenant="a")  # exactly the limit
        with pytest.raises(QuotaError):
            add(store, "a3", range(300, 301), tenant="a")
        if measure == "marginal":
            add(store, "a3", range(30), tenant="a")  # all of it is shared
        store.remove("a1")
        store.remove("a2")
        add(store, "a4", range(300, 301), tenant="a")
        assert store.verify().ok


def test_far_below_a_quota_no_block_map_is_read_for_it(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each add read those of all versions that a tenant has: 71 ms at 800 of them, not 14."""
    with pydedup.open(store_url) as store:
        for number in range(6):
            add(store, "nightly", range(number, number + 8), tenant="a")
        adapter, asked = store._adapter, list[int]()
        block_maps = adapter.block_maps

        def counting(model_id: int) -> Any:
            asked.append(model_id)
            return block_maps(model_id)

        monkeypatch.setattr(adapter, "block_maps", counting)

        def read_by_an_add() -> list[int]:
            asked.clear()
            terms: Any = {"policy": policies.Exact(), "metadata": {"tenant": "a"}}
            new = model(*range(6, 14))
            store.add("nightly", new, block_shape=(SIDE, SIDE), dry_run=True, **terms)
            return asked.copy()

        without = read_by_an_add()
        store.quotas.set("tenant", None, 40 * BLOCK)
        assert read_by_an_add() == without
        store.quotas.set("tenant", None, 14 * BLOCK)  # exactly what there is: all are looked at
        assert len(set(read_by_an_add())) == 6
        store.quotas.set("tenant", None, 14 * BLOCK - 1)
        with pytest.raises(QuotaError, match=f"would take {14 * BLOCK:,} bytes"):
            read_by_an_add()


def test_a_model_that_brings_nothing_new_is_counted_with_what_is_there(store_url: str) -> None:
    """Of pages that are there, what their rows say is the most that they can hold."""
    with pydedup.open(store_url) as store:
        add(store, "a1", range(10), tenant="a")
        store.quotas.set("tenant", "a", 9 * BLOCK)  # below what there is
        with pytest.raises(QuotaError, match=f"would take {10 * BLOCK:,} bytes"):
            add(store, "a2", range(10), tenant="a")
        store.quotas.set("tenant", "a", 10 * BLOCK)
        add(store, "a2", range(10), tenant="a")


def test_a_batch_is_counted_together(store_url: str) -> None:
    with pydedup.open(store_url) as store:
        store.quotas.set("tenant", "a", 10 * BLOCK)
        pair = {"a1": model(*range(8)), "a2": model(*range(4, 12))}
        options: Any = {"policy": policies.Exact(), "block_shape": (SIDE, SIDE)}
        with pytest.raises(QuotaError):
            store.add_many(pair, metadata={"tenant": "a"}, **options)
        assert store.models() == []
        pair["a2"] = model(*range(2, 10))  # 10 blocks together, 16 alone
        store.add_many(pair, metadata={"tenant": "a"}, **options)


def test_quotas_are_kept_and_listed(store_url: str) -> None:
    with pydedup.open(store_url) as store:
        assert list(store.quotas) == []
        store.quotas.set("tenant", "ż'; --", "2GB")
        store.quotas.set("tenant", None, 5, measure="logical")
        store.quotas.set("team", "x", 1)
        store.quotas.set("team", "x", 2)
    with pydedup.open(store_url) as store:
        assert [(str(quota), quota.bytes, quota.measure) for quota in store.quotas] == [
            ("team=x", 2, "marginal"),
            ("tenant", 5, "logical"),
            ("tenant=ż'; --", 2_000_000_000, "marginal"),
        ]
        # Each value without a quota of its own; models without the key have none.
        with pytest.raises(QuotaError, match="tenant=other"):
            add(store, "m", range(1), tenant="other")
        add(store, "m", range(1), tenant="ż'; --")
        add(store, "n", range(1, 2))
        store.quotas.remove("tenant", None)
        add(store, "o", range(2, 3), tenant="other")
        with pytest.raises(NotFoundError, match=r"tenant; there is one for: team=x, tenant=ż"):
            store.quotas.remove("tenant", None)
        bad: list[tuple[int | str, str]] = [
            ("-1", "not a size"),
            ("many", "not a size"),
            (-1, "not a size"),
            ("1.5", r"no whole number of bytes; write a unit, e.g. 1.5GB"),
            ("0.4B", "no whole number of bytes"),
            ("9e99", "not a size"),
            ("1" * 30, "not within 1 byte and 8 EiB"),
            ("9223372036854775808", "not within"),
            ("9" * 400, "not a size"),
            ("10000000TiB", "not within"),
            ("\u0665GB", "not a size"),
        ]
        for limit, said in bad:
            with pytest.raises(ArgumentError, match=said):
                store.quotas.set("tenant", "a", limit)
        with pytest.raises(ArgumentError, match="tenant= names no value; leave out the '='"):
            store.quotas.set("tenant", "", "5GB")
        assert [quota.value for quota in store.quotas] == ["x", "ż'; --"]
        for good, size in (("1.5 kB", 1500), ("9223372036854775807", 2**63 - 1), ("0", 0)):
            assert store.quotas.set("tenant", "b", good).bytes == size
        store.quotas.remove("tenant", "b")
        with pytest.raises(ArgumentError, match="measure 'gross'"):
            store.quotas.set("tenant", "a", 1, measure="gross")
        with pytest.raises(ArgumentError, match="key"):
            store.quotas.set("", "a", 1)
        store.quotas.set("tenant", "none", "0")
        with pytest.raises(QuotaError):
            add(store, "p", range(3, 4), tenant="none")
        assert len(list(store.quotas)) == 3
    with pydedup.open(store_url, mode="r") as store:
        assert len(list(store.quotas)) == 3
        with pytest.raises(ReadOnlyError):
            store.quotas.set("tenant", "a", 1)
        with pytest.raises(ReadOnlyError):
            store.quotas.remove("tenant", "none")


def test_a_quota_of_before_values_were_text_holds(store_url: str) -> None:
    with pydedup.open(store_url) as store:
        with store._adapter.transaction():
            early = '[{"key": "tenant", "value": 7, "bytes": 0, "measure": "logical"}]'
            store._adapter.set_meta("quotas", early)
        with pytest.raises(QuotaError, match="tenant=7"):
            add(store, "m", range(1), tenant=7)
        assert store.quotas.remove("tenant", "7").bytes == 0


def test_two_adds_at_once_do_not_pass_together(store_url: str) -> None:
    """Each fits by itself; both have matched before either publishes."""
    with pydedup.open(store_url) as store:
        add(store, "base", range(10))
        store.quotas.set("tenant", "a", 20 * BLOCK)
    barrier = threading.Barrier(2)
    results: list[BaseException | None] = []

    def work(number: int) -> None:
        met = False

        def meet(stage: str, done: int, total: int) -> None:
            nonlocal met
            if done >= total and not met:
                met = True
                barrier.wait(60)

        try:
            with pydedup.open(store_url) as store:
                first = 100 * (number + 1)
                store.add(
                    f"m{number}",
                    model(*range(first, first + 15)),
                    policy=policies.Exact(),
                    block_shape=(SIDE, SIDE),
                    metadata={"tenant": "a"},
                    progress=meet,
                )
            results.append(None)
        except BaseException as error:  # judged below
            results.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(type(result).__name__ for result in results) == ["NoneType", "QuotaError"]
    with pydedup.open(store_url) as store:
        assert len(store.models()) == 2
        assert by_value(store.stats(by="tenant"))["a"].marginal_bytes == 15 * BLOCK
        assert store.verify().notes == []


def test_a_quota_set_during_an_add_holds_for_it(store_url: str) -> None:
    with pydedup.open(store_url) as store, pydedup.open(store_url) as operator:

        def restrict(stage: str, done: int, total: int) -> None:
            if stage == "writing":
                operator.quotas.set("tenant", "a", BLOCK)

        with pytest.raises(QuotaError):
            store.add("m", model(1, 2), metadata={"tenant": "a"}, progress=restrict)
        assert store.models() == []
        assert store.verify().notes == []


def test_blocks_that_others_publish_during_an_add_are_free_for_it(store_url: str) -> None:
    """A quota is held against what the store has when the add is published, not when it began."""
    with pydedup.open(store_url) as store, pydedup.open(store_url) as other:
        store.quotas.set("tenant", "a", 0)
        with pytest.raises(QuotaError):
            add(store, "m", range(2), tenant="a")
        faster: list[str] = []

        def be_faster(stage: str, done: int, total: int) -> None:
            if not faster:
                faster.append(stage)
                add(other, "faster", range(2))

        store.add(
            "m",
            model(0, 1),
            policy=policies.Exact(),
            block_shape=(SIDE, SIDE),
            metadata={"tenant": "a"},
            progress=be_faster,
        )
        assert by_value(store.stats(by="tenant"))["a"].marginal_bytes == 0
        assert store.verify().notes == []


def test_quotas_that_are_changed_at_once_all_hold(store_url: str) -> None:
    """They are one row, which each change reads and writes."""
    pydedup.open(store_url).close()

    def change(number: int) -> None:
        with pydedup.open(store_url) as store:
            for name in range(8):
                store.quotas.set("tenant", f"{number}-{name}", name)
            for name in range(0, 8, 2):
                store.quotas.remove("tenant", f"{number}-{name}")

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(change, range(3)))
    with pydedup.open(store_url, mode="r") as store:
        assert [quota.value for quota in store.quotas] == [
            f"{number}-{name}" for number in range(3) for name in range(1, 8, 2)
        ]
