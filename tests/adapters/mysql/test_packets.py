# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: payloads, the packets that carry them, and the two forms of the driver."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from mysql.connector import HAVE_CEXT

import pydedup
from pydedup import registry
from pydedup.adapter import LIVE
from pydedup.errors import ArgumentError, StoreError
from pydedup.testing._contract_base import with_option

MIB = 1 << 20
Run = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def packet(url: str, run: Run) -> Iterator[Callable[[int], None]]:
    ((before,),) = run(url, "SELECT @@GLOBAL.max_allowed_packet")

    def set_to(size: int) -> None:
        run(url, f"SET GLOBAL max_allowed_packet = {size}")

    yield set_to
    set_to(before)


def test_a_server_of_small_packets_is_refused(url: str, packet: Callable[[int], None]) -> None:
    packet(MIB)
    with pytest.raises(StoreError, match=r"1048576 bytes .* max_allowed_packet to 16777216"):
        registry.connect(url, mode="a")


@pytest.mark.parametrize("size", [4 * MIB, 16 * MIB])
@pytest.mark.parametrize("pure", [True, False] if HAVE_CEXT else [True])
def test_payloads_as_large_as_the_packet(
    url: str, packet: Callable[[int], None], size: int, pure: bool
) -> None:
    packet(size)
    adapter = registry.connect(with_option(url, f"use_pure={pure}"), mode="a")
    try:
        adapter.create_schema({})
        limit = adapter.capabilities.max_payload_bytes
        assert size - 64 * 1024 == limit
        payload = os.urandom(limit)
        with adapter.transaction():
            ids = adapter.insert_pages([(bytes(16), payload)] * 2, state=LIVE)
            adapter.insert_block_maps([(1, i, 0, payload) for i in range(3)])
        assert dict(adapter.read_pages(ids)) == dict.fromkeys(ids, payload)
        assert adapter.block_map(1, 2) == [payload]
        with pytest.raises(ArgumentError, match=str(limit)) as caught, adapter.transaction():
            adapter.insert_pages([(bytes(16), bytes(limit + 1))], state=LIVE)
        # Where a larger packet would help, that is said.
        assert ("max_allowed_packet to 16777216" in str(caught.value)) == (size < 16 * MIB)
    finally:
        adapter.close()


def test_metadata_beyond_the_packet_are_told(url: str, packet: Callable[[int], None]) -> None:
    packet(2 * MIB)
    with pydedup.open(url) as store:
        with pytest.raises(
            ArgumentError, match=r"metadata of m@1 .* max_allowed_packet to 16777216"
        ):
            store.add("m@1", {"w": np.ones(3)}, metadata={"k": "x" * (3 * MIB)})
        store.add("m@1", {"w": np.ones(3)}, metadata={"k": "x" * MIB})
        assert store.verify().ok


def test_an_import_of_torch_before_the_driver_changes_nothing(url: str) -> None:
    pytest.importorskip("torch")
    code = """
import sys, torch
from pydedup import registry
adapter = registry.connect(sys.argv[1], mode="a")
adapter.create_schema({})
payload = bytes(range(256)) * (adapter.capabilities.max_payload_bytes // 256)
with adapter.transaction():
    ids = adapter.insert_pages([(bytes(16), payload)], state="live")
assert list(adapter.read_pages(ids)) == [(ids[0], payload)]
adapter.close()
"""
    subprocess.run([sys.executable, "-c", code, url], check=True)


def test_a_driver_without_its_extension_is_explained() -> None:
    code = (
        "import sys; sys.modules['_mysql_connector'] = None\n"
        "from pydedup import registry, errors\n"
        "try: registry.connect('mysql://me@localhost/db?use_pure=false', mode='r')\n"
        "except errors.ArgumentError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert "C extension of mysql-connector-python" in done.stdout, done.stderr
    assert "leave the option out" in done.stdout
