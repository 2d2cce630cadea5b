# SPDX-License-Identifier: Apache-2.0
"""Deltas on blocks of removed models: a vacuum stores them without these where that takes less."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.ingest import places
from pydedup.maintenance import orphans, vacuum
from pydedup.policies import Policy
from pydedup.testing.pages import small_pages
from pydedup.testing.program import run_here
from pydedup.text import size
from pydedup.types import DType

from .damage import change
from .relatives import Model, adapted, dense, same_bits

BOUNDED = policies.Bounded(1e-4)


def night(model: Model, seed: int) -> Model:
    """Return the next version: all weights moved a little."""
    rng = np.random.default_rng(seed)
    return {
        name: (tensor + rng.normal(0, 2e-5, tensor.shape)).astype("f4").astype(tensor.dtype)
        for name, tensor in model.items()
    }


def add_nights(
    store: pydedup.Store,
    first: Model,
    count: int,
    policy: Policy | None = None,
    tenants: str = "",
) -> dict[str, Model]:
    """Add versions, all but the first of them as deltas; returns them by address."""
    models: dict[str, Model] = {}
    model = first
    for number in range(1, count + 1):
        address = f"m@{number}"
        metadata = {"tenant": tenants[number - 1]} if tenants else None
        report = store.add(address, model, policy=policy, metadata=metadata)
        assert (report.delta_blocks > 0) == (number > 1)
        models[address] = model
        model = night(model, number)
    return models


def page_bytes_of(tmp_url: str, models: dict[str, Model]) -> int:
    """Return what these take in a store that never had others."""
    with pydedup.open(tmp_url) as store:
        for address, model in models.items():
            store.add(address, model)
        return store.stats().page_bytes


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_what_is_kept_takes_what_it_would_alone(store_url: str, tmp_path: Path, kept: int) -> None:
    """Of the first night no model was left, and its blocks were kept for the deltas on them."""
    with pydedup.open(store_url) as store:
        models = add_nights(store, dense(), kept + 2)
        for address in list(models)[:2]:
            store.remove(address)
            del models[address]
        with pydedup.open(store_url, mode="r") as reader:
            assert all(same_bits(reader, address, model) for address, model in models.items())
            with_bases = store.stats().page_bytes
            dry = store.vacuum(dry_run=True)
            wet = store.vacuum()
            # Who has the old places looks again.
            assert all(same_bits(reader, address, model) for address, model in models.items())
        foreseen = dataclasses.replace(wet, dry_run=True, stored_bytes_after=dry.stored_bytes_after)
        assert dry == foreseen
        assert dry.reencoded_blocks > 0
        assert dry.page_bytes_before - dry.page_bytes_after == pytest.approx(
            dry.reencoded_saves_bytes, rel=0.05
        )
        alone = page_bytes_of(f"sqlite:///{tmp_path}/alone.db", models)
        deltas = [sum(t.delta_blocks for t in store.explain(one).tensors) for one in models]
        assert deltas == [96] * (kept - 1) + [0]  # the newest is the base of the others
        assert alone <= 1.02 * store.stats().page_bytes <= 1.04 * alone < with_bases
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        again = store.vacuum(dry_run=True)
        assert (again.reencoded_blocks, again.rewritten_pages) == (0, 0)
        # The newest is what the next one is a delta on.
        models["m@9"] = night(models[max(models)], 99)
        added = store.add("m@9", models["m@9"])
        assert added.delta_blocks > 0.9 * added.blocks
        assert all(same_bits(store, address, model) for address, model in models.items())
    with pydedup.open(store_url, mode="r") as store:
        assert all(same_bits(store, address, model) for address, model in models.items())


def half_precision() -> Model:
    return dense(dtype=DType.BF16)


def odd_shapes() -> Model:
    rng = np.random.default_rng(5)
    shapes = (300, 200), (64, 3, 7, 7), (1000,), (40, 48), (200, 300)
    return {f"t{i}": rng.normal(0, 0.02, shape).astype("f4") for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("first", [dense, half_precision, odd_shapes])
@pytest.mark.parametrize("kept", [1, 2])
def test_blocks_of_any_kind(
    store: pydedup.Store, first: Callable[[], Model], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_PIECE_BYTES", 100_000)
    with small_pages():
        models = add_nights(store, first(), kept + 1)
        store.remove("m@1")
        del models["m@1"]
        assert store.vacuum().reencoded_blocks > 0
    assert all(same_bits(store, address, model) for address, model in models.items())
    report = store.verify()
    assert (report.errors, report.notes) == ([], [])


def test_deltas_on_transposed_and_wider_blocks(store: pydedup.Store) -> None:
    """Their bases have other rows and columns, or another dtype."""
    first = dense()
    second = night(first, 1)
    models: dict[str, Model] = {
        "export": {f"MatMul_{i}": w.T.copy() for i, w in enumerate(second.values())},
        "half": {name: w.astype(DType.F16.numpy) for name, w in night(first, 2).items()},
    }
    store.add("m", first)
    for name, model in models.items():
        report = store.add(name, model)
        assert report.delta_blocks == report.blocks
    store.remove("m")
    assert store.vacuum().reencoded_blocks > 0
    assert all(same_bits(store, name, model) for name, model in models.items())
    report = store.verify()
    assert (report.errors, report.notes) == ([], [])


def test_what_is_within_a_bound_stays_what_it_is(store: pydedup.Store) -> None:
    """Its content is not the source's, which is gone: it must not move a second time."""
    models = add_nights(store, dense(), 3, BOUNDED)
    for address in ("m@1", "m@2"):
        store.remove(address)
        del models[address]
    before = {address: store.load(address) for address in models}
    assert not any(same_bits(store, address, model) for address, model in models.items())
    assert store.vacuum().reencoded_blocks > 0
    assert all(same_bits(store, address, model) for address, model in before.items())
    report = store.verify()
    assert (report.errors, report.notes) == ([], [])


def test_a_base_that_a_model_has_stays(store: pydedup.Store) -> None:
    models = add_nights(store, dense(), 2)
    store.add("same", models["m@1"])
    store.remove("m@1")
    assert store.vacuum().reencoded_blocks == 0
    assert same_bits(store, "m@2", models["m@2"])
    assert same_bits(store, "same", models["m@1"])


def test_bases_of_others_are_no_hindrance(store: pydedup.Store) -> None:
    models = add_nights(store, dense(6), 2)
    other = {name: tensor[::-1] * np.float32(1.5) for name, tensor in dense(6).items()}
    models |= {"n@1": other, "n@2": night(other, 9)}
    for address in ("n@1", "n@2"):
        report = store.add(address, models[address])
    assert report.delta_blocks == report.blocks
    store.remove("m@1")
    del models["m@1"]
    assert store.vacuum().reencoded_blocks == report.blocks  # those of m@2
    assert all(same_bits(store, address, model) for address, model in models.items())
    assert store.verify().errors == []


def test_the_command_says_what_it_stored_anew(store: pydedup.Store, url: str) -> None:
    add_nights(store, dense(), 2)
    store.remove("m@1")
    store.close()
    for options in (("--dry-run", "--json"), ("--dry-run",), ()):
        done = run_here("vacuum", url, *options)
        if "--json" in options:
            saved = json.loads(done.stdout)["reencoded_saves_bytes"]
            continue
        (line,) = [line for line in done.stdout.splitlines() if "stored anew" in line]
        assert line.endswith(f" 96 deltas on blocks of removed models, {size(saved)} less")


def test_small_deltas_stay(store: pydedup.Store) -> None:
    """There is little to save, and all that their bases take to be written anew for it."""
    first = dense(8)
    second = {name: tensor.copy() for name, tensor in first.items()}
    for tensor in second.values():
        tensor[:, ::64] *= np.float32(1.001)
    store.add("m@1", first)
    report = store.add("m@2", second)
    assert report.delta_blocks == report.blocks
    store.remove("m@1")
    assert store.vacuum().reencoded_blocks == 0
    assert same_bits(store, "m@2", second)


def test_bases_among_blocks_in_use_stay(store: pydedup.Store) -> None:
    """A tenth of each page: all of them would be written anew for it."""
    rng = np.random.default_rng(6)
    first = {
        f"{number}.{name}": rng.normal(0, 0.02, (rows, 512)).astype("f4")
        for number in range(6)
        for name, rows in (("body", 1200), ("head", 136))
    }
    second = {**first, **night({k: v for k, v in first.items() if "head" in k}, 7)}
    store.add("m@1", first)
    report = store.add("m@2", second)
    assert report.shared_blocks > 0 < report.delta_blocks
    store.remove("m@1")
    dry = store.vacuum(dry_run=True)
    assert (dry.reencoded_blocks, dry.rewritten_pages) == (0, 0)
    store.vacuum()
    assert same_bits(store, "m@2", second)


def test_merged_adapters_keep_their_factors(store: pydedup.Store) -> None:
    """Of two with a base in common, one on the other has no low rank and takes more."""
    first = dense(2, DType.BF16)
    models = {f"a{i}": adapted(first, 4, seed=i) for i in range(2)}
    store.add("m", first)
    for name, model in models.items():
        store.add(name, model)
    store.remove("m")
    before = store.stats().page_bytes
    report = store.vacuum()
    assert store.stats().page_bytes <= before
    assert report.reencoded_blocks == 0
    assert all(same_bits(store, name, model) for name, model in models.items())
    store.remove("a0")
    store.vacuum()
    assert same_bits(store, "a1", models["a1"])
    assert store.verify().errors == []


def test_deltas_that_gain_nothing_are_no_hindrance(store: pydedup.Store) -> None:
    adapters, rest = dense(2, DType.BF16), {f"r{i}": w for i, w in enumerate(dense(3).values())}
    models = {f"a{i}": adapted(adapters, 4, seed=i) | night(rest, i) for i in range(2)}
    blocks = store.add("m", adapters | rest).blocks
    for name, model in models.items():
        assert store.add(name, model).delta_blocks == blocks
    store.remove("m")
    anew = store.vacuum().reencoded_blocks
    assert 0 < anew <= 2 * 3 * 48  # as many blocks as `rest` has
    assert all(same_bits(store, name, model) for name, model in models.items())
    assert store.verify().errors == []


def test_pages_are_not_read_where_bases_are_in_use(
    store: pydedup.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_nights(store, dense(6), 2)

    def refused(*_: object) -> None:
        raise AssertionError("pages were read")

    monkeypatch.setattr(store._pool, "windows", refused)
    assert store.vacuum().rewritten_pages == 0


def test_a_store_is_not_read_whole_each_time_for_what_does_not_pay(
    store: pydedup.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that are within a bound of their sources, one on the other takes all its bits."""
    models = add_nights(store, dense(6), 3, BOUNDED)
    store.remove("m@1")
    del models["m@1"]
    store.vacuum()

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("all pages were read")

    monkeypatch.setattr(vacuum, "repack", refused)
    assert store.vacuum().rewritten_pages == 0


@pytest.mark.parametrize(
    "damage", ["UPDATE {pages} SET payload = zeroblob(length(payload))", "DELETE FROM {block_maps}"]
)
def test_where_something_is_damaged_deltas_stay(damage: str, url: str) -> None:
    """Else all is laid out well, so there is nothing that a vacuum could not do."""
    with pydedup.open(url) as store:
        add_nights(store, dense(6), 2)
        store.remove("m@1")
    change(url, damage)
    with pydedup.open(url) as store:
        assert store.vacuum().reencoded_blocks == 0
        assert not store.verify().ok


@pytest.mark.parametrize("measure", ["marginal", "logical", None])
def test_no_tenant_pays_for_another(store_url: str, measure: str | None) -> None:
    """The one whose delta becomes a block by itself would come near its quota, or above."""
    with pydedup.open(store_url) as store:
        models = add_nights(store, dense(), 3, tenants="xyz")
        if measure is not None:
            store.quotas.set("tenant", None, "500MB", measure=measure)
        counts_blocks = measure == "marginal"
        store.remove("m@1")
        del models["m@1"]
        before = store.stats(by="tenant")
        assert (store.vacuum().reencoded_blocks == 0) == counts_blocks
        assert (store.stats(by="tenant") == before) == counts_blocks
        store.remove("m@2")
        del models["m@2"]
        if counts_blocks:  # nobody else has a part in it
            assert store.vacuum().reencoded_blocks > 0
        assert all(same_bits(store, address, model) for address, model in models.items())
        report = store.verify()
        assert report.errors == []


def test_a_copy_is_rid_of_bases_too(store_url: str, tmp_path: Path) -> None:
    """It brings them along."""
    with pydedup.open(f"sqlite:///{tmp_path}/source.db") as store:
        models = add_nights(store, dense(), 2)
        store.copy_to(store_url, ["m@2"])
    with pydedup.open(store_url) as copy:
        copied = copy.stats().page_bytes
        assert copy.vacuum().reencoded_blocks > 0
        assert copy.stats().page_bytes < 0.8 * copied
        assert same_bits(copy, "m@2", models["m@2"])
        assert copy.verify().errors == []


def test_a_delta_that_is_not_what_is_recorded_stays(
    store: pydedup.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = add_nights(store, dense(), 2)
    store.remove("m@1")
    monkeypatch.setattr(orphans, "hash_keys", lambda digests: [b""] * len(digests))
    assert store.vacuum().reencoded_blocks == 0
    assert same_bits(store, "m@2", models["m@2"])


def test_pages_that_are_mostly_in_use_are_not_written_anew_for_it(tmp_path: Path) -> None:
    """There the base would take as much as before, for nobody."""
    rng = np.random.default_rng(0)
    names = rng.permutation([f"frozen{i}" for i in range(200)] + [f"tuned{i}" for i in range(10)])
    first = {name: rng.standard_normal((64, 64), np.float32) for name in names.tolist()}
    tuned = {name: tensor for name, tensor in first.items() if name.startswith("tuned")}
    second = first | night(tuned, 1)
    with pydedup.open(tmp_path / "store.db") as store:
        store.add("first", first)
        assert store.add("second", second).delta_blocks == len(tuned)
        store.remove("first")
        before = set(store._adapter.page_ids("live"))
        store.vacuum()
        assert len(before.intersection(store._adapter.page_ids("live"))) >= len(before) - 2
        assert same_bits(store, "second", second)
        assert store.verify().ok


@pytest.mark.parametrize("kib", [64, 1024])
def test_a_merged_adapter_takes_what_it_would_alone(
    store: pydedup.Store, tmp_path: Path, kib: int
) -> None:
    """Its factors are with the first block of a page alone, which seemed to be the one to mend."""
    with small_pages(kib):
        store.add("base", dense())
        merged = adapted(dense(), 4)
        store.add("merged", merged)
        store.remove("base")
        done = store.vacuum()
        again = store.vacuum()
        alone = page_bytes_of(f"sqlite:///{tmp_path}/alone.db", {"merged": merged})
    assert done.reencoded_blocks == sum(t.blocks for t in store.explain("merged").tensors)
    assert done.page_bytes_after <= 1.01 * alone < done.page_bytes_before
    assert done.page_bytes_before - done.page_bytes_after == pytest.approx(
        done.reencoded_saves_bytes, rel=0.05
    )
    assert (again.rewritten_pages, again.freed_pages) == (0, 0)
    assert same_bits(store, "merged", merged)
    report = store.verify()
    assert (report.errors, report.notes) == ([], [])


def test_deltas_among_other_blocks_on_a_page_that_goes_anyway(store: pydedup.Store) -> None:
    """They were left for the page to stay, which is written anew for what is read of it."""
    rng = np.random.default_rng(8)

    def drawn(rows: int) -> Model:
        return {"w": rng.standard_normal((rows, 256)).astype("f4")}

    first = drawn(80)
    models = {"m@2": night(first, 1), "large@1": drawn(600)}
    store.add("m@1", first)
    store.add_many(models)
    for address in ("s@1", "t@1"):
        models[address] = drawn(20)
        store.add(address, models[address])
    store.remove("m@1")
    done = store.vacuum()
    assert (done.rewritten_pages, done.pages_after) == (4, 1)
    assert done.reencoded_blocks == sum(t.blocks for t in store.explain("m").tensors)
    again = store.vacuum()
    assert (again.rewritten_pages, again.freed_pages) == (0, 0)
    assert all(same_bits(store, address, model) for address, model in models.items())
    report = store.verify()
    assert (report.errors, report.notes) == ([], [])


def test_the_factors_of_another_adapter_on_the_page_are_not_its_own(store: pydedup.Store) -> None:
    """They made one of a low rank seem larger than it is, as soon as both were on one page."""
    bases = {
        f"base{i}@1": {"w": np.random.default_rng(i).normal(0, 0.02, (768, 384)).astype("f4")}
        for i in range(2)
    }
    ranks = {"a@1": (0, 32), "b@1": (0, 2), "c@1": (1, 2)}
    models = {
        address: adapted(bases[f"base{i}@1"], rank, seed=40 + rank)
        for address, (i, rank) in ranks.items()
    }
    for address, model in (bases | models).items():
        store.add(address, model)
    for address in bases:
        store.remove(address)
    done, again = store.vacuum(), store.vacuum()
    assert done.rewritten_pages > 0
    assert (again.rewritten_pages, again.freed_pages) == (0, 0)
    assert all(same_bits(store, address, model) for address, model in models.items())
