# SPDX-License-Identifier: Apache-2.0
"""The adapter contract for pages: payloads to the bit, states, limits, and their space."""

from __future__ import annotations

import contextlib
import random
import threading
from itertools import islice

import pytest

from pydedup.adapter import LIVE, RETIRED, STAGING, Adapter
from pydedup.adapter_options import NumberingAdapter, ReadIntoAdapter, RecordedPagesAdapter
from pydedup.errors import ArgumentError, PydedupError, StoreError
from pydedup.testing._contract_base import (
    EVERY_BYTE,
    ContractBase,
    add_pages,
    add_random_pages,
    checksum_of,
    model_row,
)

__all__ = ["PagesContract"]

KIB, MIB = 1 << 10, 1 << 20

#: Around the limits of drivers' buffers, packets, pages of databases, and of our own pages.
SIZES = sorted(
    {0, 1, 255, 256, 257, 15 * MIB, 17 * MIB}
    | {size + d for size in (4 * KIB, 16 * KIB, 64 * KIB, MIB, 4 * MIB) for d in (-1, 0, 1)}
)

#: A limit up to here is written to the full.
LARGEST_PROBE_BYTES = 64 * MIB


class PagesContract(ContractBase):
    """Payloads survive to the bit; states decide what is found."""

    # ---- binary round trips -------------------------------------------------------------------

    def test_payloads_survive(self, adapter: Adapter, url: str) -> None:
        """Every byte value, in sizes around every limit, read by the adapter and behind it."""
        limit = adapter.capabilities.max_payload_bytes
        stored: dict[int, tuple[bytes, bytes]] = {}
        for size in SIZES:
            payload = random.Random(size).randbytes(size)
            payload = (EVERY_BYTE + payload)[:size] if size > 256 else payload
            checksum = random.Random(size + 1).randbytes(16)
            if size > limit:
                with pytest.raises(ArgumentError, match=str(limit)), adapter.transaction():
                    adapter.insert_pages([(checksum, payload)], state=LIVE)
                continue
            with adapter.transaction():
                (page_id,) = adapter.insert_pages([(checksum, payload)], state=LIVE)
            stored[page_id] = (checksum, payload)
            ((found_id, found),) = adapter.read_pages([page_id])
            assert found_id == page_id
            assert type(found) is bytes
            assert found == payload, size
        raw = self.raw_rows(url, "pages", ["id", "checksum", "payload"])
        assert raw == [(page_id, *row) for page_id, row in stored.items()]
        for row in adapter.page_rows():
            checksum, payload = stored[row.id]
            assert (row.checksum, row.payload_bytes) == (checksum, len(payload))
            assert row.retired_at is None

    def test_bytes_are_not_text(self, adapter: Adapter) -> None:
        """Bytes that are special in SQL or in an encoding, alone and as hashes."""
        for value in (0, 0x27, 0x5C, 0x25, 0x3F, 0x3A, 0x80, 0xC3, 0xFF):
            payload = bytes([value]) * 32
            with adapter.transaction():
                (page_id,) = adapter.insert_pages([(payload[:16], payload)], state=LIVE)
                adapter.insert_blocks([(payload[:16], page_id, 0, None)])
            assert list(adapter.read_pages([page_id])) == [(page_id, payload)]
            (block,) = adapter.find_blocks([payload[:16]])
            assert block.hash128 == payload[:16]
            assert type(block.hash128) is bytes

    def test_the_largest_payload(self, adapter: Adapter) -> None:
        """What capabilities promise is taken, and one byte more refused before it is sent."""
        limit = adapter.capabilities.max_payload_bytes
        assert limit >= 16 * MIB - 64 * KIB, "a page of 1 MiB must fit well"
        if limit <= LARGEST_PROBE_BYTES:
            payload = random.Random(1).randbytes(limit)
            with adapter.transaction():
                ids = adapter.insert_pages([(bytes(16), payload)], state=LIVE)
            assert list(adapter.read_pages(ids)) == [(ids[0], payload)]
        too_large = bytes(limit + 1)
        with pytest.raises(ArgumentError, match=str(limit)), adapter.transaction():
            adapter.insert_pages([(bytes(16), too_large)], state=LIVE)
        with pytest.raises(ArgumentError, match=str(limit)), adapter.transaction():
            adapter.insert_block_maps([(1, 0, 0, too_large)])
        assert adapter.block_map(1, 0) == []

    # ---- pages --------------------------------------------------------------------------------

    def test_ids_come_in_order_and_once(self, adapter: Adapter) -> None:
        """Ids grow, also after the last page was deleted."""
        ids = add_pages(adapter, 5)
        assert ids == sorted(set(ids))
        assert min(ids) > 0
        with adapter.transaction():
            adapter.delete_pages(ids[3:])
        assert min(add_pages(adapter, 1)) > ids[-1]

    def test_reading_skips_what_is_not_there(self, adapter: Adapter) -> None:
        """Missing ids are left out, repeated ones are read once."""
        ids = add_pages(adapter, 40)
        with adapter.transaction():
            adapter.delete_pages([ids[3]])
        wanted = [*reversed(ids), ids[0], ids[-1] + 100, 2**40]
        found = dict(adapter.read_pages(wanted))
        assert sorted(found) == [*ids[:3], *ids[4:]]
        assert all(found[page_id] == bytes([i]) * 100 for i, page_id in enumerate(ids) if i != 3)
        assert len(list(adapter.read_pages(wanted))) == 39
        assert list(adapter.read_pages([])) == []

    @pytest.mark.parametrize("in_snapshot", [False, True])
    def test_between_two_pages_all_else_may_be_done(
        self, adapter: Adapter, *, in_snapshot: bool
    ) -> None:
        """While pages are read, others may be, and outside of a snapshot written."""
        pages = add_random_pages(adapter, 40, size=256 * KIB)
        with adapter.snapshot() if in_snapshot else contextlib.nullcontext():
            for number, (page_id, payload) in enumerate(adapter.read_pages(list(pages))):
                assert payload == pages[page_id]
                assert [row.id for row in adapter.page_rows(ids=[page_id])] == [page_id]
                others = dict(adapter.read_pages(list(pages)[::7]))
                assert others == {other: pages[other] for other in list(pages)[::7]}
                if number % 16 == 3 and not in_snapshot:
                    add_pages(adapter, 1)
            assert number == 39
        assert len(adapter.page_rows()) == (40 if in_snapshot else 43)

    def test_reading_may_be_given_up(self, adapter: Adapter) -> None:
        """A reading that ends early leaves nothing behind that is in the way of what comes next."""
        pages = add_random_pages(adapter, 40, size=256 * KIB)
        for count in range(0, 40, 4):
            reading = adapter.read_pages(list(pages))
            assert all(pages[number] == payload for number, payload in islice(reading, count))
            if count % 8:
                del reading
            assert len(adapter.page_rows()) == 40 + count // 4
            add_pages(adapter, 1)
        assert dict(adapter.read_pages(list(pages))) == pages

    def test_closing_in_the_middle_of_reading(self, adapter: Adapter) -> None:
        """What has not come is an error, and no wrong or missing page."""
        pages = add_random_pages(adapter, 40, size=256 * KIB)
        reading = adapter.read_pages(list(pages))
        seen = dict(islice(reading, 3))
        adapter.close()
        with contextlib.suppress(StoreError):
            seen |= dict(reading)
            assert len(seen) == 40
        assert seen.items() <= pages.items()

    def test_pages_are_listed_in_parts(self, adapter: Adapter) -> None:
        """Ascending ids after a given one, filtered and cut as asked."""
        ids = add_pages(adapter, 30)
        with adapter.transaction():
            adapter.set_page_state(ids[::3], RETIRED, 12.5)
        assert [row.id for row in adapter.page_rows()] == ids
        assert [row.id for row in adapter.page_rows(after=ids[9], limit=5)] == ids[10:15]
        retired = adapter.page_rows(state=RETIRED, after=ids[0], limit=3)
        assert [(row.id, row.state, row.retired_at) for row in retired] == [
            (page_id, RETIRED, 12.5) for page_id in (ids[3], ids[6], ids[9])
        ]
        assert adapter.page_ids(RETIRED) == ids[::3]
        assert adapter.page_ids(LIVE) == [page_id for page_id in ids if page_id not in ids[::3]]
        assert adapter.page_ids(STAGING) == []
        some = [ids[20], ids[3], ids[20], ids[5], 2**40]
        assert [row.id for row in adapter.page_rows(ids=some)] == [ids[3], ids[5], ids[20]]
        assert [row.id for row in adapter.page_rows(ids=some, state=LIVE)] == [ids[5], ids[20]]
        assert [row.id for row in adapter.page_rows(ids=some, limit=2)] == [ids[3], ids[5]]
        assert [row.id for row in adapter.page_rows(ids=some, after=ids[3])] == [ids[5], ids[20]]
        assert adapter.page_rows(ids=[]) == []
        assert adapter.page_rows(limit=0) == []
        seen: list[int] = []
        while part := adapter.page_rows(after=seen[-1] if seen else 0, limit=7):
            seen += [row.id for row in part]
        assert seen == ids

    def test_states_change_and_payloads_do_not(self, adapter: Adapter) -> None:
        """Every change of state leaves the bytes alone, at a size that is stored apart."""
        payloads = [random.Random(i).randbytes(300_000 + i) for i in range(3)]
        with adapter.transaction():
            ids = adapter.insert_pages(
                [(checksum_of(i), payload) for i, payload in enumerate(payloads)], state=STAGING
            )
        steps = [(LIVE, None), (RETIRED, 1_700_000_000.25), (RETIRED, 1e9), (LIVE, None)]
        for state, retired_at in [*steps, (STAGING, None)]:
            with adapter.transaction():
                adapter.set_page_state(ids[:2], state, retired_at)
            changed, also, other = adapter.page_rows()
            assert (changed.state, changed.retired_at) == (state, retired_at)
            assert (also.state, also.retired_at) == (state, retired_at)
            assert (other.state, other.retired_at) == (STAGING, None)
            assert dict(adapter.read_pages(ids)) == dict(zip(ids, payloads, strict=True))
            assert [row.checksum for row in adapter.page_rows()] == [
                checksum_of(i) for i in (0, 1, 2)
            ]

    def test_pages_come_with_what_their_rows_record(self, adapter: Adapter) -> None:
        """Without it they are asked for twice."""
        if not isinstance(adapter, RecordedPagesAdapter):
            assert not hasattr(adapter, "read_recorded_pages")
            return
        payloads = [random.Random(i).randbytes(3000 + i) for i in range(40)]
        with adapter.transaction():
            ids = adapter.insert_pages(
                [(checksum_of(i), payload) for i, payload in enumerate(payloads)], state=LIVE
            )
        found = list(adapter.read_recorded_pages([*ids[::-1], *ids[:3], ids[-1] + 1]))
        assert sorted(found) == [
            (page_id, checksum_of(i), payload)
            for i, (page_id, payload) in enumerate(zip(ids, payloads, strict=True))
        ]
        assert list(adapter.read_recorded_pages([])) == []

    def test_payloads_are_read_into_memory_that_is_given(self, adapter: Adapter) -> None:
        """Any page may be left out, and is never given twice."""
        if not isinstance(adapter, ReadIntoAdapter):
            assert not hasattr(adapter, "read_pages_into")
            return
        payloads = [
            random.Random(i).randbytes(size) for i, size in enumerate(SIZES) if size < 5 * MIB
        ]
        with adapter.transaction():
            ids = adapter.insert_pages(
                [(checksum_of(i), payload) for i, payload in enumerate(payloads)], state=LIVE
            )
        adapter.checkpoint()
        rows = {
            page_id: (checksum_of(i), payload)
            for i, (page_id, payload) in enumerate(zip(ids, payloads, strict=True))
        }
        sizes: list[int] = []

        def memory(nbytes: int) -> memoryview:
            sizes.append(nbytes)
            return memoryview(bytearray(nbytes))

        for _ in range(2):
            given = list(adapter.read_pages_into([*ids, *ids[:3], ids[-1] + 1], memory))
            found = {page_id: (checksum, bytes(view)) for page_id, checksum, view in given}
            assert len(found) == len(given)
            assert found == {page_id: rows[page_id] for page_id in found}
            assert set(sizes) <= {len(payload) for payload in payloads}
        with adapter.transaction():
            adapter.delete_pages(ids)
        for page_id, _, view in adapter.read_pages_into(ids, memory):
            assert bytes(view) == rows[page_id][1]
        assert list(adapter.read_pages_into([], memory)) == []

    def test_pages_whose_ids_were_given_before(self, adapter: Adapter) -> None:
        """Transactions of two threads, open at once, write them, the later ones first."""
        if not isinstance(adapter, NumberingAdapter):
            assert not hasattr(adapter, "new_page_ids"), "insert_pages has to take them, too"
            return
        numbering: NumberingAdapter = adapter
        ids = numbering.new_page_ids(40)
        later = numbering.new_page_ids(3)
        assert numbering.new_page_ids(0) == []
        assert ids == sorted(set(ids))
        assert ids[-1] < later[0]
        pages = {i: (checksum_of(i), random.Random(i).randbytes(i * 100)) for i in ids[:20]}
        mine, theirs = ids[:10], ids[10:20]
        others: list[int] = []

        def write(some: list[int]) -> list[int]:
            with adapter.transaction():
                return numbering.insert_pages([pages[i] for i in some], state=STAGING, ids=some)

        writer = threading.Thread(target=lambda: others.extend(write(theirs)))
        with adapter.transaction():
            assert numbering.insert_pages([pages[i] for i in mine], state=STAGING, ids=mine) == mine
            writer.start()
            writer.join(30)
            assert others == theirs
            assert [row.id for row in adapter.page_rows()] == ids[:20]
        with adapter.transaction():
            (own,) = adapter.insert_pages([(bytes(16), b"")], state=LIVE)
        assert own > later[-1], "nobody else gets them, unused ones included"
        found = dict(adapter.read_pages(ids))
        assert found == {i: payload for i, (_, payload) in pages.items()}
        with pytest.raises(StoreError):
            numbering.insert_pages([(bytes(16), b"")], state=LIVE, ids=later[:1])
        with pytest.raises(PydedupError), adapter.transaction():
            numbering.insert_pages([(bytes(16), b"")], state=LIVE, ids=mine[:1])
        assert [row.id for row in adapter.page_rows()] == [*ids[:20], own]

    def test_deleting_pages_deletes_their_blocks(self, adapter: Adapter) -> None:
        """Blocks on other pages stay."""
        ids = add_pages(adapter, 4)
        with adapter.transaction():
            adapter.delete_pages([ids[0], ids[2], 2**40])
            adapter.delete_pages([])
        assert [row.id for row in adapter.page_rows()] == [ids[1], ids[3]]
        assert [row.page_id for row in adapter.blocks_on_pages(ids)] == [ids[1]] * 2 + [ids[3]] * 2
        assert adapter.count_blocks() == 4

    def test_orphans_are_pages_that_nobody_reads(self, adapter: Adapter) -> None:
        """Whatever the state of the page or of the model."""
        ids = add_pages(adapter, 6)
        with adapter.transaction():
            model_id = adapter.insert_model(model_row())
            adapter.insert_model_pages([(model_id, ids[1], 1, 1), (model_id, ids[4], 1, 1)])
            adapter.set_page_state(ids[:2], RETIRED, 1.0)
            adapter.set_page_state(ids[2:3], STAGING)
        assert adapter.orphan_pages() == [ids[0], ids[2], ids[3], ids[5]]
        assert adapter.orphan_pages([ids[5], ids[4], ids[2], ids[5], 2**40]) == [ids[2], ids[5]]
        assert adapter.orphan_pages([]) == []

    # ---- upkeep -------------------------------------------------------------------------------

    def test_space_comes_back(self, adapter: Adapter) -> None:
        """Deleting and compacting frees what was taken, where the database can."""
        adapter.checkpoint()
        before = adapter.stored_bytes()
        with adapter.transaction():
            ids = adapter.insert_pages(
                [(checksum_of(i), random.Random(i).randbytes(MIB)) for i in range(16)], state=LIVE
            )
        adapter.checkpoint()
        full = adapter.stored_bytes()
        assert full >= before + 15 * MIB
        assert full >= sum(row.payload_bytes for row in adapter.page_rows())
        assert isinstance(adapter.size_is_exact(), bool)
        with adapter.transaction():
            adapter.delete_pages(ids[:-1])
        adapter.compact()
        if adapter.capabilities.shrinks:
            assert adapter.stored_bytes() <= before + 2 * MIB
        ((_, payload),) = adapter.read_pages(ids)
        assert payload == random.Random(15).randbytes(MIB)
        assert adapter.integrity_errors() == []
