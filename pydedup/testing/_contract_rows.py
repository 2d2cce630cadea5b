# SPDX-License-Identifier: Apache-2.0
"""The adapter contract for meta, models, aliases, artifacts, tensors, block maps and jobs."""

from __future__ import annotations

import pytest

from pydedup import registry
from pydedup.adapter import LIVE, RETIRED, SCHEMA_VERSION, STAGING, Adapter
from pydedup.errors import ArgumentError, DuplicateError, StoreError
from pydedup.testing._contract_base import (
    EVERY_BYTE,
    HOSTILE_NAMES,
    META,
    ContractBase,
    add_pages,
    model_row,
    tensor_row,
)

__all__ = ["RowsContract"]


class RowsContract(ContractBase):
    """Descriptions come back as they were given, in the order that is promised."""

    # ---- schema and meta ----------------------------------------------------------------------

    def test_an_empty_place_has_no_schema(self, url: str) -> None:
        """An empty place is distinguished from a store."""
        with registry.opened(url, mode="a") as adapter:
            assert adapter.schema_version() is None
            adapter.create_schema(META)
            assert adapter.schema_version() == SCHEMA_VERSION

    def test_creating_twice_changes_nothing(self, adapter: Adapter) -> None:
        """The second of two creators finds the work done."""
        with adapter.transaction():
            adapter.insert_model(model_row())
            adapter.bump_epoch()
        adapter.create_schema({**META, "greeting": "other"})
        assert adapter.meta()["greeting"] == META["greeting"]
        assert len(adapter.models(state=None)) == 1
        assert adapter.epoch() == 1

    def test_meta_holds_text(self, adapter: Adapter) -> None:
        """Values are inserted, replaced and returned."""
        assert META.items() <= adapter.meta().items()
        assert adapter.epoch() == 0
        with adapter.transaction():
            adapter.set_meta("new", "")
            adapter.set_meta("greeting", "\N{ROCKET}" * 10_000)
        assert adapter.meta()["new"] == ""
        assert adapter.meta()["greeting"] == "\N{ROCKET}" * 10_000

    def test_epoch_is_compared_and_set(self, adapter: Adapter) -> None:
        """The epoch grows by one, and only from the expected value."""
        with adapter.transaction():
            assert adapter.bump_epoch()
            assert adapter.epoch() == 1
            assert adapter.bump_epoch(1)
            assert not adapter.bump_epoch(1)
            assert not adapter.bump_epoch(7)
        assert adapter.epoch() == 2
        for expected in range(2, 12):  # also where the number of digits grows
            with adapter.transaction():
                assert adapter.bump_epoch(expected)
        assert adapter.epoch() == 12

    # ---- models -------------------------------------------------------------------------------

    def test_a_model_comes_back_as_given(self, adapter: Adapter) -> None:
        """Every column survives."""
        row = model_row(state=LIVE, created_at=0.1 + 0.2, logical_bytes=2**62, digest=EVERY_BYTE)
        with adapter.transaction():
            model_id = adapter.insert_model(row)
        (found,) = adapter.models()
        assert found.id == model_id > 0
        assert (found.name, found.version, found.state) == (row.name, row.version, row.state)
        assert found.created_at == row.created_at
        assert (found.policy, found.certificate) == (row.policy, row.certificate)
        assert (found.metadata, found.logical_bytes) == (row.metadata, row.logical_bytes)
        assert found.digest == row.digest
        assert type(found.digest) is bytes

    def test_hostile_names_are_only_names(self, adapter: Adapter) -> None:
        """Nothing in a name is SQL, a wildcard, or the same as another name."""
        ids = {}
        with adapter.transaction():
            for name in HOSTILE_NAMES:
                ids[name] = adapter.insert_model(model_row(name, name, LIVE, metadata=name))
                adapter.set_alias(name, name, ids[name])
                adapter.insert_tensors([tensor_row(ids[name], 0, name)])
                adapter.insert_artifacts(ids[name], [(name, name, name.encode())])
                adapter.put_job(name, name, name, "running")
        for name, model_id in ids.items():
            (found,) = adapter.models(name=name)
            assert (found.id, found.name, found.version) == (model_id, name, name)
            assert found.metadata == name
            assert adapter.aliases(name) == [(name, name, model_id)]
            assert adapter.tensors(model_id)[0].name == name
            assert adapter.artifacts(model_id) == [(name, name)]
            assert adapter.artifact(model_id, name) == name.encode()
            assert adapter.artifact(model_id, name + "x") is None
        jobs = [(name, name, name, "running") for name in HOSTILE_NAMES]
        assert sorted(adapter.jobs()) == sorted(jobs)
        assert len(adapter.models()) == len(HOSTILE_NAMES)

    def test_newest_models_are_the_last_ones_by_id(self, adapter: Adapter) -> None:
        """They come in the order of all, filters hold first, and few models are all of them."""
        with adapter.transaction():
            for number in range(6):
                state = STAGING if number == 5 else LIVE
                adapter.insert_model(model_row("a" if number % 2 else "b", str(number), state))
        assert [row.version for row in adapter.models(newest=2)] == ["3", "4"]
        assert [row.version for row in adapter.models(newest=2, state=None)] == ["4", "5"]
        assert [row.version for row in adapter.models(name="a", newest=1)] == ["3"]
        assert adapter.models(newest=100) == adapter.models()
        assert adapter.models(newest=0) == []

    def test_models_are_listed_by_id(self, adapter: Adapter) -> None:
        """Filters hold, and the order is that of insertion."""
        with adapter.transaction():
            ids = [
                adapter.insert_model(model_row(name, version, state))
                for version in ("2", "1")
                for name in ("b", "a")
                for state in (STAGING, RETIRED, LIVE)
            ]
        assert ids == sorted(set(ids))
        assert [row.id for row in adapter.models(state=None)] == ids
        assert [row.id for row in adapter.models()] == ids[2::3]
        assert [row.version for row in adapter.models(name="a")] == ["2", "1"]
        assert [row.state for row in adapter.models(name="a", state=STAGING)] == [STAGING] * 2
        assert len(adapter.models(name="a", state=None)) == 6
        assert adapter.models(name="c", state=None) == []

    def test_a_model_is_found_by_version_or_alias(self, adapter: Adapter) -> None:
        """Among the live ones of that name, to the letter; a version goes before an alias."""
        with adapter.transaction():
            ids = {
                (name, version, state): adapter.insert_model(model_row(name, version, state))
                for version in ("1", "2", "a", "a ")
                for name in ("m", "M")
                for state in (STAGING, RETIRED, LIVE)
            }
            for alias, version in (("prod", "2"), ("a", "1"), ("b", "1")):
                adapter.set_alias("m", alias, ids["m", version, LIVE])
            adapter.set_alias("m", "staged", ids["m", "2", STAGING])
            adapter.set_alias("m", "damaged", ids["M", "2", LIVE])
        expected = {"1": "1", "2": "2", "a": "a", "a ": "a ", "prod": "2", "b": "1"}
        for selector, version in expected.items():
            row = adapter.model_called("m", selector)
            assert row == adapter.model(ids["m", version, LIVE])
            assert row is not None
            assert (row.name, row.version, row.state) == ("m", version, LIVE)
        for selector in ("staged", "damaged", "A", "3", "", "prod ", "Prod"):
            assert adapter.model_called("m", selector) is None
        assert adapter.model_called("M", "prod") is None
        assert adapter.model_called("n", "1") is None
        assert adapter.model(ids["m", "1", RETIRED]) is None
        assert adapter.model(max(ids.values()) + 1) is None

    def test_a_live_name_and_version_is_unique(self, adapter: Adapter) -> None:
        """A second one is refused, whether inserted or published; staged ones may coexist."""
        with adapter.transaction():
            first = adapter.insert_model(model_row())
            second = adapter.insert_model(model_row())
            assert adapter.update_model(first, state=LIVE)
        for state in (STAGING, LIVE):
            with pytest.raises(DuplicateError, match="m@1"), adapter.transaction():
                adapter.insert_model(model_row(state=state))
        with pytest.raises(DuplicateError, match="m@1"), adapter.transaction():
            adapter.insert_model(model_row(), replaces=second)
        with pytest.raises(DuplicateError, match="m@1"), adapter.transaction():
            adapter.update_model(second, state=LIVE)
        assert [row.id for row in adapter.models()] == [first]
        with adapter.transaction():
            adapter.insert_model(model_row("M", "1", LIVE))
            adapter.insert_model(model_row("m", "1 ", LIVE))
            adapter.update_model(first, state=RETIRED)
            assert adapter.update_model(second, state=LIVE)
        assert second in [row.id for row in adapter.models()]

    def test_a_model_takes_the_place_of_another(self, adapter: Adapter) -> None:
        """It is staged beside the one that it replaces, and is live once that is gone."""
        with adapter.transaction():
            first = adapter.insert_model(model_row(state=LIVE))
        with adapter.transaction():
            second = adapter.insert_model(model_row(), replaces=first)
        with pytest.raises(DuplicateError, match="m@1"), adapter.transaction():
            adapter.update_model(second, state=LIVE)
        with adapter.transaction():
            adapter.delete_model(first)
            adapter.update_model(second, state=LIVE)
        assert [row.id for row in adapter.models(state=None)] == [second]

    def test_only_what_is_given_is_updated(self, adapter: Adapter) -> None:
        """Each column can be changed alone; a missing row is reported."""
        with adapter.transaction():
            model_id = adapter.insert_model(model_row())
            other = adapter.insert_model(model_row("other"))
            for _ in range(2):  # a row that is as it shall be is there, too
                assert adapter.update_model(model_id, certificate="c")
            assert adapter.update_model(model_id, logical_bytes=0, digest=b"")
            assert adapter.update_model(model_id, created_at=5.5)
            assert adapter.update_model(model_id)
            assert not adapter.update_model(model_id + other, state=LIVE)
            assert not adapter.update_model(model_id + other)
        changed, same = adapter.models(state=None)
        assert (changed.certificate, changed.logical_bytes, changed.digest) == ("c", 0, b"")
        assert (changed.created_at, changed.state) == (5.5, STAGING)
        assert changed.policy == same.policy
        assert same.certificate == model_row().certificate

    def test_unknown_states_are_refused(self, adapter: Adapter) -> None:
        """States are a fixed set."""
        with adapter.transaction():
            model_id = adapter.insert_model(model_row())
            with pytest.raises(ArgumentError, match="gone"):
                adapter.insert_model(model_row(state="gone"))
            with pytest.raises(ArgumentError, match="gone"):
                adapter.update_model(model_id, state="gone")
            with pytest.raises(ArgumentError, match="gone"):
                adapter.insert_pages([], state="gone")
            with pytest.raises(ArgumentError, match="gone"):
                adapter.set_page_state([1], "gone")

    def test_deleting_a_model_deletes_what_is_its_own(self, adapter: Adapter) -> None:
        """Rows of other models, pages and blocks stay."""
        (page,) = add_pages(adapter, 1)
        with adapter.transaction():
            gone, kept = (adapter.insert_model(model_row(name, "1", LIVE)) for name in "ab")
            for model_id in (gone, kept):
                adapter.set_alias("a" if model_id == gone else "b", "prod", model_id)
                adapter.insert_artifacts(model_id, [("config.json", "application/json", b"{}")])
                adapter.insert_tensors([tensor_row(model_id, 0)])
                adapter.insert_block_maps([(model_id, 0, 0, b"map")])
                adapter.insert_source_hashes([(model_id, 0, 0, b"hash")])
                adapter.insert_model_pages([(model_id, page, 2, 100)])
        with adapter.transaction():
            adapter.delete_model(gone)
        assert [row.id for row in adapter.models(state=None)] == [kept]
        assert adapter.aliases() == [("b", "prod", kept)]
        assert adapter.model_pages() == [(kept, page, 2, 100)]
        for model_id, count in ((gone, 0), (kept, 1)):
            assert len(adapter.artifacts(model_id)) == count
            assert len(adapter.tensors(model_id)) == count
            assert len(adapter.block_map(model_id, 0)) == count
            assert len(adapter.source_hashes(model_id, 0, 1)) == count
        assert adapter.count_blocks() == 2
        with adapter.transaction():
            again = adapter.insert_model(model_row("a", "1", LIVE))
        assert again > kept, "an id was used twice"

    # ---- aliases, artifacts, jobs -------------------------------------------------------------

    def test_aliases_move(self, adapter: Adapter) -> None:
        """An alias is inserted, moved, listed in order and deleted."""
        with adapter.transaction():
            for name, alias, model_id in (("b", "x", 1), ("a", "y", 2), ("a", "x", 3)):
                adapter.set_alias(name, alias, model_id)
            adapter.set_alias("a", "y", 9)
        assert adapter.aliases() == [("a", "x", 3), ("a", "y", 9), ("b", "x", 1)]
        assert adapter.aliases("a") == [("a", "x", 3), ("a", "y", 9)]
        with adapter.transaction():
            assert adapter.delete_alias("a", "x")
            assert not adapter.delete_alias("a", "x")
        assert adapter.aliases() == [("a", "y", 9), ("b", "x", 1)]

    def test_artifacts_may_be_large(self, adapter: Adapter) -> None:
        """Artifacts are cut and joined where needed."""
        sizes = (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (5 << 20) + 7)
        for model_id, size in enumerate(sizes, 7):
            payload = (EVERY_BYTE * (size // 256 + 1))[:size]
            with adapter.transaction():
                given = [("z", "text/plain", payload), ("a", "a/b", b"!")]
                adapter.insert_artifacts(model_id, given)
            assert adapter.artifacts(model_id) == [("a", "a/b"), ("z", "text/plain")]
            found = adapter.artifact(model_id, "z")
            assert type(found) is bytes
            assert found == payload, size
            assert adapter.artifact(model_id, "missing") is None
            assert adapter.artifact(model_id + 1, "z") is None

    def test_jobs_are_replaced(self, adapter: Adapter) -> None:
        """A job is inserted, replaced and deleted."""
        with adapter.transaction():
            adapter.put_job("b", "{}", "", "running")
            adapter.put_job("a", "spec", "1", "running")
            adapter.put_job("b", "{}", "2", "paused")
        assert adapter.jobs() == [("a", "spec", "1", "running"), ("b", "{}", "2", "paused")]
        with adapter.transaction():
            adapter.delete_job("a")
            adapter.delete_job("missing")
        assert adapter.jobs() == [("b", "{}", "2", "paused")]

    # ---- signatures ---------------------------------------------------------------------------

    def test_signatures_are_kept_by_segment_and_group(self, adapter: Adapter) -> None:
        """Groups come back in the order of segments; segments go as a whole."""
        big = EVERY_BYTE * 4096
        rows = [(2**62 + 1, 0, b""), (7, 2**61, big), (7, 0, EVERY_BYTE), (1, 2**61, b"x")]
        with adapter.transaction():
            adapter.insert_signatures(iter(rows))
        assert list(adapter.signatures(2**61)) == [(1, b"x"), (7, big)]
        assert list(adapter.signatures(0)) == [(7, EVERY_BYTE), (2**62 + 1, b"")]
        assert {type(payload) for _, payload in adapter.signatures(0)} == {bytes}
        assert list(adapter.signatures(5)) == []
        found = sorted(adapter.signatures_of([2**62 + 1, 7, 999]))
        assert found == sorted(row for row in rows if row[0] != 1)
        assert {type(payload) for _, _, payload in found} == {bytes}
        assert list(adapter.signatures_of([])) == []
        many = list(range(100, 140))
        with adapter.transaction():
            adapter.insert_signatures((segment, 9, b"%d" % segment) for segment in reversed(many))
        assert list(adapter.signatures(9)) == [(segment, b"%d" % segment) for segment in many]
        assert adapter.segments(9) == list(many)
        assert (adapter.segments(2**61), adapter.segments(5)) == ([1, 7], [])
        some = [*many[::3], many[-1] + 10**6]
        assert list(adapter.signatures(9, some)) == [(s, b"%d" % s) for s in some[:-1]]
        assert list(adapter.signatures(9, [])) == []
        with adapter.transaction():
            adapter.delete_signatures([7, 999])
            adapter.delete_signatures([])
        assert list(adapter.signatures(2**61)) == [(1, b"x")]
        assert list(adapter.signatures(0)) == [(2**62 + 1, b"")]

    # ---- tensors and block maps ---------------------------------------------------------------

    def test_tensors_are_listed_by_ordinal(self, adapter: Adapter) -> None:
        """The order of insertion does not matter, and models do not mix."""
        with adapter.transaction():
            adapter.insert_tensors(tensor_row(1, i, f"t{i}") for i in (2, 10, 0, 1))
            adapter.insert_tensors([tensor_row(2, 0, "other")])
            adapter.insert_tensors([])
        assert [row.ordinal for row in adapter.tensors(1)] == [0, 1, 2, 10]
        assert adapter.tensors(2) == [tensor_row(2, 0, "other")]
        assert adapter.tensors(3) == []
        both = [*adapter.tensors(1), *adapter.tensors(2)]
        assert adapter.tensors_of([2, 3, 1, 2]) == both
        assert (adapter.tensors_of([3]), adapter.tensors_of([])) == ([], [])

    def test_parts_come_back_in_order(self, adapter: Adapter) -> None:
        """Block maps and source hashes keep their parts, bytes and order."""
        parts = [EVERY_BYTE, b"", b"\0" * 70_000, b"'; --", b"\xff" * (1 << 20)]
        rows = [(1, 0, i, part) for i, part in enumerate(parts)]
        with adapter.transaction():
            adapter.insert_block_maps([*reversed(rows), (1, 1, 0, b"x"), (2, 0, 0, b"y")])
            adapter.insert_source_hashes([(2, 0, 0, b"z"), (1, 3, 0, b"x"), (1, 1, 1, b"v")])
            adapter.insert_source_hashes(iter([*reversed(rows), (1, 1, 0, b"w")]))
        assert adapter.block_map(1, 0) == parts
        of_first, of_second = [(0, part) for part in parts], [(1, b"w"), (1, b"v")]
        assert adapter.source_hashes(1, 0, 1) == of_first
        assert adapter.source_hashes(1, 0, 3) == of_first + of_second
        assert adapter.source_hashes(1, 1, 4) == [*of_second, (3, b"x")]
        assert {type(part) for _, part in adapter.source_hashes(1, 0, 4)} == {bytes}
        assert {type(part) for part in adapter.block_map(1, 0)} == {bytes}
        assert (adapter.block_map(1, 1), adapter.block_map(2, 0)) == ([b"x"], [b"y"])
        assert (adapter.block_map(3, 0), adapter.source_hashes(1, 2, 3)) == ([], [])
        assert adapter.block_maps(1) == [*((0, part) for part in parts), (1, b"x")]
        assert {type(part) for _, part in adapter.block_maps(1)} == {bytes}
        assert (adapter.block_maps(2), adapter.block_maps(3)) == ([(0, b"y")], [])
        of_both = [*((1, *part) for part in adapter.block_maps(1)), (2, 0, b"y")]
        assert adapter.block_maps_of([2, 3, 1, 2]) == of_both
        assert (adapter.block_maps_of([3]), adapter.block_maps_of([])) == ([], [])

    def test_block_maps_are_replaced_whole(self, adapter: Adapter) -> None:
        """Fewer parts than before leave no old one behind; other tensors and models keep theirs."""
        old = [(ordinal, b"old") for ordinal in (0, 1, 2) for _ in range(2)]
        with adapter.transaction():
            for model_id in (1, 2):
                parts = enumerate(old)
                adapter.insert_block_maps((model_id, n, i % 2, part) for i, (n, part) in parts)
        with adapter.transaction():
            adapter.replace_block_maps(1, {2: [b"new"], 0: [b"a", b"b", b"c"]})
        replaced = [(0, b"a"), (0, b"b"), (0, b"c"), (1, b"old"), (1, b"old"), (2, b"new")]
        assert adapter.block_maps(1) == replaced
        with adapter.transaction():
            adapter.replace_block_maps(1, {0: [], 2: []})
            adapter.replace_block_maps(1, {})
        assert adapter.block_maps(1) == old[2:4]
        assert adapter.block_maps(2) == old

    def test_a_key_is_taken_once(self, adapter: Adapter) -> None:
        """The same part twice is an error, and none of it is kept."""
        with pytest.raises(StoreError), adapter.transaction():
            adapter.insert_block_maps([(1, 0, 0, b"a"), (1, 0, 0, b"b")])
        assert adapter.block_map(1, 0) == []
