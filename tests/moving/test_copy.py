# SPDX-License-Identifier: Apache-2.0
"""Copies between all pairs of back ends: the same pages in an empty store, the same bits in any."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import psycopg
import pytest

import pydedup
from pydedup import policies, registry
from pydedup.adapter import LIVE
from pydedup.errors import (
    ArgumentError,
    CorruptStoreError,
    NotAStoreError,
    NotFoundError,
    ReadOnlyError,
)
from pydedup.maintenance.vacuum import read_amplification

BACKENDS = ("sqlite", "postgres", "mysql")
PAIRS = [(a, b) for a in BACKENDS for b in BACKENDS]
GOLDEN = Path(__file__).parent.parent / "golden"

New = Callable[[str], str]


def checksums(url: str) -> Counter[bytes]:
    adapter = registry.connect(url, mode="r")
    try:
        return Counter(row.checksum for row in adapter.page_rows(state=LIVE))
    finally:
        adapter.close()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_an_empty_store_gets_the_pages_as_they_are(
    filled_for_all: New, new_store: New, assert_same: Callable[..., None], source: str, target: str
) -> None:
    source_url, url = filled_for_all(source), new_store(target)
    stages: list[tuple[str, int, int]] = []
    with pydedup.open(source_url, mode="r") as store:
        report = store.copy_to(url, progress=lambda *state: stages.append(state))
        pages, reads = store.stats().pages, sorted(read_amplification(store._adapter).values())
    assert {model.status for model in report.models} == {"copied"}
    assert sum(model.whole_pages for model in report.models) == pages
    assert sum(model.pages for model in report.models) == pages
    assert report.aliases == 2
    assert checksums(url) == checksums(source_url)
    assert_same(source_url, url)
    with pydedup.open(url, mode="r") as store:
        assert [info.address for info in store.models() if "prod" in info.aliases] == ["near@1"]
        assert sorted(read_amplification(store._adapter).values()) == reads
        x = np.ones((2, 256), np.float32)
        with pydedup.open(source_url, mode="r") as other:
            assert np.array_equal(store.predict("near@2", x), other.predict("near@2", x))
    told = [(done, total) for stage, done, total in stages if stage == "copying"]
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {stage for stage, _, _ in stages} == {"copying", "checking"}


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if "sqlite" in pair])
def test_a_store_with_models_gets_only_what_it_lacks(
    filled_for_all: New,
    new_store: New,
    family: Callable[..., Any],
    assert_same: Callable[..., None],
    source: str,
    target: str,
) -> None:
    source_url, url = filled_for_all(source), new_store(target)
    with pydedup.open(url) as store:
        others = {"other@1": family(0), "other@2": family(9), "alien@1": family(0, root=7)}
        store.add_many(others)
        before = store.stats()
    with pydedup.open(source_url, mode="r") as store:
        report = store.copy_to(url)
        brought = store.stats().page_bytes
    assert_same(source_url, url)
    with pydedup.open(url) as store:
        grown = store.stats().page_bytes - before.page_bytes
        # The whole of the base model is there, as the base of deltas too.
        assert 0 < grown < 0.75 * brought
        assert grown == pytest.approx(report.stored_bytes, rel=0.1)
        assert report.models[0].stored_bytes < 1000, "base@1 is other@1 but for a number"
        for address, model in others.items():
            assert all(np.array_equal(store.load(address)[k], v) for k, v in model.items())
        # Everything is still found: what is added there afterwards shares with what was copied.
        again = store.add("again@1", family(4))
        assert again.stored_bytes < 1000
        store.vacuum()
        assert store.verify().ok


def test_pages_that_are_there_are_not_written_again(
    filled: New, new_store: New, family: Callable[..., Any], assert_same: Callable[..., None]
) -> None:
    source_url, url = filled("sqlite"), new_store("sqlite")
    with pydedup.open(source_url) as store:
        store.copy_to(url, ["base", "exact@1"])
        store.add("late@1", family(1) | {"step": np.array(77)})
        report = store.copy_to(url)
        assert Counter(model.status for model in report.models) == {"there": 2, "copied": 7}
        (late,) = [model for model in report.models if model.model == "late@1"]
        assert late.stored_bytes < 500
        again = store.copy_to(url)
        assert (again.copied, again.stored_bytes, again.aliases) == (0, 0, 2)
    assert_same(source_url, url)


def test_a_page_that_is_damaged_there_is_not_relied_upon(
    new_store: New, family: Callable[..., Any], change_page: Any
) -> None:
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(source_url) as store:
        store.add("m@1", family(0))
        store.copy_to(url)
        store.add("m@2", family(0))
        with pydedup.open(url) as target:
            pages = {page for _, page, _, _ in target._adapter.model_pages()}
        for page in pages:
            change_page(url, page, lambda payload: payload.__setitem__(-1, payload[-1] ^ 1))
        store.copy_to(url, ["m@2"])
    with pydedup.open(url, mode="r") as target:
        loaded = target.load("m@2")
        assert all(np.array_equal(loaded[name], array) for name, array in family(0).items())
        with pytest.raises(CorruptStoreError):
            target.load("m@1")


def test_which_end_has_a_damaged_page_is_told(new_store: New, change_page: Any) -> None:
    rng = np.random.default_rng(9)
    base, other = (rng.standard_normal((256, 64)).astype(np.float32) for _ in range(2))
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(url) as target:
        target.add("m@1", {"w": base})
        target.add("z@1", {"w": base[:128], "other": other})
        pages = {page for _, page, _, _ in target._adapter.model_pages()}
        there = target.url
    for page in pages:
        change_page(url, page, lambda payload: payload.__setitem__(-1, payload[-1] ^ 1))
    with pydedup.open(source_url) as store:
        store.add("m@1", {"w": base})
        store.add("m@2", {"w": base * np.float32(1 + 1e-6)})
        with pytest.raises(CorruptStoreError) as caught:
            store.copy_to(url, ["m@2"])
    assert f"copying m@2 from {store.url} to {there}: page " in str(caught.value)
    assert f"restores it in {there} from another store" in str(caught.value)


def test_pages_that_are_there_with_deltas_that_lost_their_base(new_store: New) -> None:
    rng = np.random.default_rng(9)
    base, own = (rng.standard_normal((256, 64)).astype(np.float32) for _ in range(2))
    mixed = {"w": base * np.float32(1 + 1e-6), "own": own}
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(source_url) as store, pydedup.open(url) as target:
        store.add("base@1", {"w": base})
        assert store.add_many({"mixed@1": mixed, "other@1": {"own": own}})[0].delta_blocks
        store.copy_to(url)
        target.remove("mixed")
        target.remove("base")
        assert any("whose base is gone" in note for note in target.verify().notes)
        store.copy_to(url, ["mixed"])
        assert target.verify().errors == []
        target.vacuum()
        assert target.verify().errors == []
        assert all(np.array_equal(target.load("mixed")[k], w) for k, w in mixed.items())


def test_deltas_that_are_there_on_bases_that_are_there_twice(
    new_store: New, change_page: Any
) -> None:
    """A base was added again while its page could not be read: which of the two is read counts."""
    rng = np.random.default_rng(9)
    base, more = (rng.standard_normal((256, 64)).astype(np.float32) for _ in range(2))
    near = {"w": base * np.float32(1 + 1e-6)}
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(url) as target:
        target.add("base@1", {"w": base, "more": more})
    with pydedup.open(source_url) as store:
        store.add("base@1", {"w": base})
        assert store.add_many({"one@1": near, "two@1": near})[0].delta_blocks
        store.copy_to(url, ["one"])
        change_page(url, 1, lambda payload: payload.__setitem__(-1, payload[-1] ^ 1))
        with pydedup.open(url) as target:
            assert target.add("again@1", {"w": base}).damaged_pages == (1,)
        change_page(url, 1, lambda payload: payload.__setitem__(-1, payload[-1] ^ 1))
        assert store.copy_to(url, ["two"]).stored_bytes == 0
    with pydedup.open(url, mode="r") as target:
        report = target.verify()
        assert report.notes == [
            "page 3 has 4 blocks of page 1 once more: no damage, and a vacuum may free the room"
        ]
        assert report.errors == []
        assert np.array_equal(target.load("two@1")["w"], near["w"])


@pytest.mark.parametrize("target", BACKENDS)
def test_some_models_bring_the_bases_of_their_deltas(
    filled: New, new_store: New, assert_same: Callable[..., None], target: str
) -> None:
    source_url, url = filled("sqlite"), new_store(target)
    with pydedup.open(source_url, mode="r") as store:
        report = store.copy_to(url, ["close@1", "near@prod"])
        total = store.stats().page_bytes
    assert [model.model for model in report.models] == ["near@1", "close@1"]
    assert all(model.delta_blocks > 0 for model in report.models)
    assert_same(source_url, url, names={"near@1", "close@1"})
    with pydedup.open(url, mode="r") as store:
        assert len(store.models()) == 2
        assert store.stats().page_bytes < total


def test_deltas_of_a_later_model_come_along_on_whole_pages(
    new_store: New, assert_same: Callable[..., None]
) -> None:
    """Their bases, which the model itself does not use, came with an earlier one."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal((32, 32, 32)).astype(np.float32)
    near = (base * (1 + 1e-4 * rng.standard_normal(base.shape))).astype(np.float32)
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(source_url) as store:
        store.add("base@1", {"w": base.reshape(-1, 32)}, block_shape=(32, 32))
        halves = {"first@1": near[:16], "second@1": near[16:]}
        tensors = {name: {"w": half.reshape(-1, 32)} for name, half in halves.items()}
        reports = store.add_many(tensors, block_shape=(32, 32))
        assert [report.delta_blocks for report in reports] == [16, 16]
        assert [store.info(name).pages for name in tensors] == [2, 2], "they share theirs"
        report = store.copy_to(url)
    assert [model.whole_pages for model in report.models] == [1, 1, 0]
    assert checksums(url) == checksums(source_url)
    assert_same(source_url, url)


def test_what_nobody_uses_any_more_is_left_behind(
    filled: New, new_store: New, assert_same: Callable[..., None]
) -> None:
    source_url, url = filled("sqlite"), new_store("sqlite")
    with pydedup.open(source_url) as store:
        for address in ("base@1", "exact@1", "near@2"):
            if address == "near@2":
                store.alias("near", "next", None)
            store.remove(address)
        store.copy_to(url)
        before = store.stats()
    assert_same(source_url, url)
    with pydedup.open(url) as store:
        assert store.stats().page_bytes < before.page_bytes
        assert store.stats().distinct_blocks < before.distinct_blocks


def test_a_delta_on_a_base_that_is_a_delta_there_is_made_anew(
    new_store: New, family: Callable[..., Any], assert_same: Callable[..., None]
) -> None:
    source_url, url = new_store("sqlite"), new_store("sqlite")
    with pydedup.open(source_url) as store:
        store.add("root@1", family(1))
        store.add("leaf@1", family(2))
        store.add("loose@1", family(3), policy=policies.Bounded(0.001))
        own = store.stats().page_bytes
    with pydedup.open(url) as store:
        store.add("trunk@1", family(0))
        report = store.add("twig@1", family(1))
        assert report.delta_blocks > 0
        before = store.stats().page_bytes
    with pydedup.open(source_url, mode="r") as store:
        report = store.copy_to(url)
    root, leaf, loose = report.models
    assert root.stored_bytes == 0
    assert leaf.delta_blocks > 0
    assert loose.delta_blocks > 0
    assert_same(source_url, url)
    with pydedup.open(url, mode="r") as store:
        assert store.stats().page_bytes - before < 0.6 * own


@pytest.mark.parametrize("target", BACKENDS)
def test_hostile_names_arrive(
    new_store: New, assert_same: Callable[..., None], target: str
) -> None:
    names = [
        "a'; DROP TABLE x; --",
        'q"`\\%_',
        "żółw🐢",
        "Z" * 255,
        "🐢" * 255,
        "a b",
        "A B",
        "None",
    ]
    source_url, url = new_store("sqlite"), new_store(target)
    rng = np.random.default_rng(0)
    with pydedup.open(source_url) as store:
        for number, name in enumerate(names):
            tensors = {
                other: rng.standard_normal((3, number + 1)) for other in [*names, " ", "a\u2028"]
            }
            store.add(f"{name}@{names[-1 - number]}", tensors, metadata={name: names})
            store.alias(name, "alias-" + name[:200], names[-1 - number])
        store.copy_to(url)
    assert_same(source_url, url)


def golden(kind: str, url: str, run: Callable[..., object]) -> None:
    """Put the golden store that an earlier version wrote into an empty place."""
    (file,) = GOLDEN.glob(f"store_v1.{kind}.gz")
    content = gzip.decompress(file.read_bytes())
    if kind == "db":
        Path(url.removeprefix("sqlite:///")).write_bytes(content)
    elif kind == "mysql.sql":
        run(url, *(part for part in content.decode().split(";\n") if part.strip()))
    else:
        parts = urlsplit(url)
        schema = dict(parse_qsl(parts.query))["schema"]
        with psycopg.connect(url.replace(f"schema={schema}", "").rstrip("?&")) as connection:
            connection.execute(content.replace(b"pydedup_golden", schema.encode()))


@pytest.mark.parametrize(
    ("source", "kind"), [("sqlite", "db"), ("postgres", "postgres.sql"), ("mysql", "mysql.sql")]
)
@pytest.mark.parametrize("target", BACKENDS)
def test_a_store_of_an_earlier_version_is_copied(
    request: pytest.FixtureRequest,
    new_store: New,
    mysql_run: Callable[..., object],
    assert_same: Callable[..., None],
    source: str,
    kind: str,
    target: str,
) -> None:
    if source == "mysql":  # mariadb-dump writes what MySQL computes, and refuses to be told
        request.getfixturevalue("of_mariadb")
    source_url, url = new_store(source), new_store(target)
    golden(kind, source_url, mysql_run)
    with pydedup.open(source_url, mode="r") as store:
        store.copy_to(url)
    assert_same(source_url, url)
    assert checksums(url) == checksums(source_url)


def test_what_is_wrong_creates_nothing(
    filled: New, new_store: New, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_url, url = filled("sqlite"), new_store("sqlite")
    path = Path(url.removeprefix("sqlite:///"))
    with pydedup.open(source_url) as store:
        with pytest.raises(NotFoundError, match="no model 'missing'"):
            store.copy_to(url, ["base", "missing"])
        with pytest.raises(ArgumentError, match="unknown on_conflict 'ask'"):
            store.copy_to(url, on_conflict="ask")
        with pytest.raises(ArgumentError, match="names one version"):
            store.copy_to(url, ["near@1"], all_versions=True)
        assert not path.exists()
        with pytest.raises(ArgumentError, match="are one store"):
            store.copy_to(source_url)
        other = tmp_path / "notes.txt"
        other.write_text("notes " * 1000)
        with pytest.raises(NotAStoreError):
            store.copy_to(other)
        assert store._adapter.jobs() == []
        pydedup.open(path).close()
        path.chmod(0o444)
        monkeypatch.setattr("os.access", lambda where, mode: False)
        with pytest.raises(ReadOnlyError, match="cannot copy models there"):
            store.copy_to(path)


def test_a_copy_of_the_file_is_another_store(
    filled: New, tmp_path: Path, family: Callable[..., Any], assert_same: Callable[..., None]
) -> None:
    source_url = filled("sqlite")
    copy = tmp_path / "copy.db"
    copy.write_bytes(Path(source_url.removeprefix("sqlite:///")).read_bytes())
    with pydedup.open(source_url) as store:
        store.add("late", family(7))
        assert store.copy_to(copy).copied == 1
    assert_same(source_url, str(copy))


@pytest.mark.parametrize("target", BACKENDS)
def test_all_versions_of_a_name(filled: New, new_store: New, target: str) -> None:
    with pydedup.open(filled("sqlite"), mode="r") as store:
        url = new_store(target)
        assert [m.model for m in store.copy_to(url, ["near"]).models] == ["near@2"]
        report = store.copy_to(url, ["near"], all_versions=True)
        assert [m.model for m in report.models] == ["near@1", "near@2"]
        assert [m.status for m in report.models] == ["copied", "there"]


def test_a_damaged_page_is_not_copied(filled: New, new_store: New, tmp_path: Path) -> None:
    import sqlite3

    source_url, url = filled("sqlite"), new_store("sqlite")
    path = source_url.removeprefix("sqlite:///")
    with pydedup.open(source_url, mode="r") as store:
        adapter = store._adapter
        exact = next(row for row in adapter.models(name="exact"))
        others = {p for m, p, _, _ in adapter.model_pages() if m != exact.id}
        page_id = next(p for _, p, _, _ in adapter.model_pages(exact.id) if p not in others)
    with closing(sqlite3.connect(path)) as connection, connection:
        (payload,) = connection.execute(
            "SELECT payload FROM pydedup_pages WHERE id = ?", [page_id]
        ).fetchone()
        broken = bytearray(payload)
        broken[len(broken) // 2] ^= 1
        connection.execute("UPDATE pydedup_pages SET payload = ? WHERE id = ?", [broken, page_id])
    connection.close()
    with pydedup.open(source_url, mode="r") as store:
        with pytest.raises(pydedup.PydedupError, match=rf"exact@1 .*page {page_id}\b"):
            store.copy_to(url)
        with pydedup.open(url) as copy:
            assert {info.name for info in copy.models()} == {"base", "near", "close"}
            copy.vacuum()
            assert (copy.verify().errors, copy.verify().notes) == ([], [])
        # The others can be had by name.
        names = ["near", "close", "kept", "nothing", "hollow"]
        assert store.copy_to(url, names).copied == 3
