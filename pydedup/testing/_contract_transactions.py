# SPDX-License-Identifier: Apache-2.0
"""The adapter contract for transactions, snapshots, threads, closing and reading alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pydedup import registry
from pydedup.adapter import LIVE, STAGING, Adapter
from pydedup.errors import ConflictError, NotAStoreError, ReadOnlyError, StoreError
from pydedup.testing._contract_base import (
    PATIENCE_SECONDS,
    ContractBase,
    add_pages,
    checksum_of,
    in_thread,
    model_row,
    tensor_row,
)

__all__ = ["TransactionsContract"]

CHANGES: dict[str, Callable[[Adapter], Any]] = {
    "set_meta": lambda a: a.set_meta("x", "y"),
    "bump_epoch": lambda a: a.bump_epoch(),
    "insert_model": lambda a: a.insert_model(model_row()),
    "update_model": lambda a: a.update_model(1, state=LIVE),
    "delete_model": lambda a: a.delete_model(1),
    "set_alias": lambda a: a.set_alias("m", "prod", 1),
    "delete_alias": lambda a: a.delete_alias("m", "prod"),
    "insert_artifacts": lambda a: a.insert_artifacts(1, [("a", "b", b"c")]),
    "insert_tensors": lambda a: a.insert_tensors([tensor_row(1, 0)]),
    "insert_block_maps": lambda a: a.insert_block_maps([(1, 0, 0, b"")]),
    "replace_block_maps": lambda a: a.replace_block_maps(1, {0: [b""]}),
    "insert_source_hashes": lambda a: a.insert_source_hashes([(1, 0, 0, b"")]),
    "insert_pages": lambda a: a.insert_pages([(bytes(16), b"")], state=LIVE),
    "set_page_state": lambda a: a.set_page_state([1], LIVE),
    "delete_pages": lambda a: a.delete_pages([1]),
    "insert_model_pages": lambda a: a.insert_model_pages([(1, 1, 1, 1)]),
    "delete_model_pages": lambda a: a.delete_model_pages(1),
    "insert_blocks": lambda a: a.insert_blocks([(bytes(16), 1, 0, None)]),
    "delete_blocks": lambda a: a.delete_blocks([1]),
    "put_job": lambda a: a.put_job("j", "", "", ""),
    "delete_job": lambda a: a.delete_job("j"),
}

READS: dict[str, Callable[[Adapter], Any]] = {
    "schema_version": lambda a: a.schema_version(),
    "meta": lambda a: a.meta(),
    "epoch": lambda a: a.epoch(),
    "models": lambda a: a.models(),
    "aliases": lambda a: a.aliases(),
    "artifacts": lambda a: a.artifacts(1),
    "artifact": lambda a: a.artifact(1, "a"),
    "tensors": lambda a: a.tensors(1),
    "tensors_of": lambda a: a.tensors_of([1]),
    "block_map": lambda a: a.block_map(1, 0),
    "block_maps": lambda a: a.block_maps(1),
    "block_maps_of": lambda a: a.block_maps_of([1]),
    "source_hashes": lambda a: a.source_hashes(1, 0, 1),
    "read_pages": lambda a: list(a.read_pages([1])),
    "page_rows": lambda a: a.page_rows(),
    "page_ids": lambda a: a.page_ids(LIVE),
    "orphan_pages": lambda a: a.orphan_pages(),
    "model_pages": lambda a: a.model_pages(),
    "find_blocks": lambda a: a.find_blocks([bytes(16)]),
    "blocks_on_pages": lambda a: a.blocks_on_pages([1]),
    "segments": lambda a: a.segments(0),
    "signatures": lambda a: list(a.signatures(0, [1])),
    "count_blocks": lambda a: a.count_blocks(),
    "jobs": lambda a: a.jobs(),
    "view": lambda a: a.view("sharing"),
}


class Broken(Exception):  # noqa: N818 - not an error of anybody's
    """Raised by tests inside of transactions."""


def change_everything(adapter: Adapter) -> None:
    """Insert a row into every table."""
    model_id = adapter.insert_model(model_row())
    adapter.set_meta("half", "done")
    adapter.set_alias("m", "prod", model_id)
    adapter.insert_artifacts(model_id, [("a", "b", b"c" * (3 << 20))])
    adapter.insert_tensors([tensor_row(model_id, 0)])
    adapter.insert_block_maps([(model_id, 0, 0, b"map")])
    adapter.insert_source_hashes([(model_id, 0, 0, b"hash")])
    rows = [(checksum_of(i), bytes(256 << 10)) for i in range(40)]  # of ten statements
    pages = adapter.insert_pages(rows, state=LIVE)
    adapter.insert_blocks((checksum_of(page_id), page_id, 0, None) for page_id in pages)
    adapter.insert_model_pages((model_id, page_id, 1, 1) for page_id in pages)
    adapter.put_job("j", "", "", "running")
    adapter.bump_epoch()
    adapter.update_model(model_id, state=LIVE)


def _change_and_raise(adapter: Adapter, error: type[BaseException]) -> None:
    change_everything(adapter)
    raise error


def contents(adapter: Adapter) -> dict[str, Any]:
    """Return what a reader sees of :func:`change_everything`."""
    return {
        "models": [row.name for row in adapter.models(state=None)],
        "meta": adapter.meta(),
        "aliases": [row[:2] for row in adapter.aliases()],
        "pages": len(adapter.page_rows()),
        "blocks": adapter.count_blocks(),
        "readers": len(adapter.model_pages()),
        "jobs": adapter.jobs(),
        "sizes": adapter.view("model_sizes"),
    }


class TransactionsContract(ContractBase):
    """All of a transaction or nothing, and nobody sees it half done."""

    def test_an_exception_undoes_everything(self, adapter: Adapter, url: str) -> None:
        """Whatever the exception; the adapter is as good as before."""
        before = contents(adapter)
        for error in (Broken, KeyboardInterrupt, GeneratorExit):
            with pytest.raises(error), adapter.transaction():
                _change_and_raise(adapter, error)
            assert contents(adapter) == before
            assert adapter.artifact(1, "a") is None
            assert self.raw_rows(url, "pages", ["id"]) == []
        with adapter.transaction():
            change_everything(adapter)
        assert contents(adapter)["models"] == ["m"]
        assert len(self.raw_rows(url, "pages", ["id"])) == 40

    def test_rows_that_fail_to_come_undo_everything(self, adapter: Adapter) -> None:
        """An exception in the caller's generator passes through, and nothing is kept."""

        def rows() -> Any:
            adapter.put_job("j", "", "", "")
            yield (checksum_of(1), 1, 0, None)
            raise Broken

        with pytest.raises(Broken), adapter.transaction():
            adapter.insert_blocks(rows())
        assert adapter.jobs() == []
        assert adapter.blocks_on_pages([1]) == []

    def test_nobody_sees_half_a_transaction(self, adapter: Adapter, url: str) -> None:
        """Other threads, adapters and clients see all of it, after the end, or nothing."""
        with registry.opened(url, mode="a") as other:
            before = contents(adapter)
            with adapter.transaction():
                change_everything(adapter)
                assert contents(adapter) != before, "a transaction sees its own changes"
                assert in_thread(lambda: contents(adapter)) == before
                assert contents(other) == before
                assert self.raw_rows(url, "pages", ["id"]) == []
            after = contents(adapter)
            assert after["sizes"][0]["pages"] == 40
            assert in_thread(lambda: contents(adapter)) == after
            assert contents(other) == after

    def test_a_snapshot_stays_the_same(self, adapter: Adapter) -> None:
        """It is fixed when it begins, not at its first read, and ends with its block."""
        ids = add_pages(adapter, 3)
        before = contents(adapter)

        def change() -> None:
            with adapter.transaction():
                change_everything(adapter)
                adapter.delete_pages(ids[:1])

        with adapter.snapshot():
            in_thread(change)
            assert contents(adapter) == before
            assert len(list(adapter.read_pages(ids))) == 3
            with adapter.snapshot():
                assert contents(adapter) == before, "an inner snapshot is part of the outer"
            assert contents(adapter) == before
            assert in_thread(lambda: contents(adapter)) != before
        assert contents(adapter) != before
        assert len(list(adapter.read_pages(ids))) == 2

    def test_an_exception_ends_a_snapshot(self, adapter: Adapter) -> None:
        """After it, the newest state is seen."""
        with pytest.raises(Broken), adapter.snapshot():
            raise Broken
        in_thread(lambda: add_pages(adapter, 1))
        assert adapter.count_blocks() == 2

    def test_changes_need_a_transaction(self, adapter: Adapter) -> None:
        """Outside of one, and in a snapshot, they are refused and change nothing."""
        before = contents(adapter)
        for name, change in CHANGES.items():
            with pytest.raises(StoreError, match="transaction"):
                change(adapter)
            with pytest.raises(StoreError, match="transaction"), adapter.snapshot():
                change(adapter)
            assert contents(adapter) == before, name

    def test_transactions_do_not_nest(self, adapter: Adapter) -> None:
        """An inner one is refused, and the outer undone by that error like by any other."""
        for outer, inner in (
            (adapter.transaction, adapter.transaction),
            (adapter.transaction, adapter.snapshot),
            (adapter.snapshot, adapter.transaction),
        ):
            with pytest.raises(StoreError, match="inside"), outer(), inner():
                pass
        with adapter.transaction():
            adapter.put_job("a", "", "", "")
            with pytest.raises(StoreError, match="inside"), adapter.transaction():
                pass
            adapter.put_job("b", "", "", "")
        assert [job[0] for job in adapter.jobs()] == ["a", "b"]

    # ---- writers --------------------------------------------------------------------------------

    def test_publishing_waits_and_then_gives_up(self, adapter: Adapter, url: str) -> None:
        """Of two that bump the epoch the second waits; too long is a ConflictError, no hang."""
        with registry.opened(self.with_lock_wait(url, 0.3), mode="a") as hasty:

            def publish() -> None:
                with hasty.transaction():
                    hasty.bump_epoch()

            with adapter.transaction():
                adapter.bump_epoch()
                with pytest.raises(ConflictError):
                    in_thread(publish)
            publish()
            assert adapter.epoch() == 2

    def test_writers_of_different_rows(self, adapter: Adapter, url: str) -> None:
        """They run at once exactly when capabilities say so."""
        with registry.opened(self.with_lock_wait(url, 0.3), mode="a") as hasty:

            def stage() -> None:
                with hasty.transaction():
                    hasty.insert_pages([(checksum_of(1), b"theirs")], state=STAGING)

            with adapter.transaction():
                adapter.insert_pages([(checksum_of(2), b"mine")], state=STAGING)
                if adapter.capabilities.concurrent_writers:
                    in_thread(stage)
                else:
                    with pytest.raises(ConflictError):
                        in_thread(stage)
                    assert len(adapter.page_rows()) == 1

    def test_threads_write_one_after_the_other(self, adapter: Adapter) -> None:
        """No publish is lost, and none is half done, with readers beside."""
        writers, rounds = 4, 15
        failures: list[BaseException] = []
        done = threading.Event()

        def write(number: int) -> None:
            try:
                for i in range(rounds):
                    with adapter.transaction():
                        assert adapter.bump_epoch()
                        page = adapter.insert_pages([(checksum_of(i), b"p" * 9000)], state=LIVE)
                        adapter.insert_blocks([(checksum_of(number), page[0], 0, None)] * 3)
            except BaseException as error:  # shown below
                failures.append(error)

        def read() -> None:
            try:
                while not done.is_set():
                    with adapter.snapshot():
                        pages = [row.id for row in adapter.page_rows()]
                        assert adapter.epoch() == len(pages)
                        assert adapter.count_blocks() == 3 * len(pages)
                        assert len(list(adapter.read_pages(pages))) == len(pages)
            except BaseException as error:  # shown below
                failures.append(error)

        readers = [threading.Thread(target=read) for _ in range(2)]
        threads = [threading.Thread(target=write, args=(i,)) for i in range(writers)]
        for thread in readers + threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        done.set()
        for thread in readers:
            thread.join(PATIENCE_SECONDS)
        assert not failures, failures
        assert adapter.epoch() == writers * rounds
        assert adapter.count_blocks() == 3 * writers * rounds

    # ---- closing and reading alone ------------------------------------------------------------

    def test_a_closed_adapter_says_so(self, adapter: Adapter) -> None:
        """Every call raises StoreError; closing again is fine; another adapter is not touched."""
        add_pages(adapter, 1)
        in_thread(adapter.models)
        adapter.close()
        adapter.close()
        for read in READS.values():
            with pytest.raises(StoreError, match="closed"):
                read(adapter)
        for scope in (adapter.transaction, adapter.snapshot):
            with pytest.raises(StoreError, match="closed"), scope():
                pass
        with pytest.raises(StoreError, match="closed"):
            in_thread(adapter.models)

    def test_closing_undoes_what_is_open(self, url: str) -> None:
        """A transaction that another thread is in is rolled back, and told so."""
        adapter = self.open(url)
        begun, closed = threading.Event(), threading.Event()

        def write() -> None:
            with adapter.transaction():
                adapter.put_job("j", "", "", "")
                begun.set()
                assert closed.wait(PATIENCE_SECONDS)
                adapter.put_job("k", "", "", "")

        def close() -> None:
            assert begun.wait(PATIENCE_SECONDS)
            adapter.close()
            closed.set()

        closer = threading.Thread(target=close)
        closer.start()
        with pytest.raises(StoreError, match="closed"):
            in_thread(write)
        closer.join(PATIENCE_SECONDS)
        with contextlib.closing(self.open(url)) as with_fresh:
            assert with_fresh.jobs() == []

    def test_reading_alone(self, adapter: Adapter, url: str) -> None:
        """Mode "r" reads everything, sees new commits, and refuses every change."""
        with adapter.transaction():
            change_everything(adapter)
        with registry.opened(url, mode="r") as reader:
            assert reader.read_only
            assert not adapter.read_only
            assert contents(reader) == contents(adapter)
            for read in READS.values():
                read(reader)
            with pytest.raises(ReadOnlyError), reader.transaction():
                pass
            for change in CHANGES.values():
                with pytest.raises(ReadOnlyError):
                    change(reader)
            with pytest.raises(ReadOnlyError):
                reader.compact()
            with pytest.raises(ReadOnlyError):
                reader.create_schema({})
            reader.checkpoint()
            assert reader.integrity_errors() == []
            assert reader.stored_bytes() > 0
            with reader.snapshot():
                before = contents(reader)
                add_pages(adapter, 1)
                assert contents(reader) == before
            assert contents(reader) == contents(adapter) != before

    def test_reading_alone_creates_nothing(self, url: str) -> None:
        """An empty place is no store, and stays empty."""
        try:
            reader = registry.connect(url, mode="r")
        except NotAStoreError:
            pass
        else:
            assert reader.schema_version() is None
            reader.close()
        with registry.opened(url, mode="a") as adapter:
            assert adapter.schema_version() is None
