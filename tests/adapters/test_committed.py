# SPDX-License-Identifier: Apache-2.0
"""What a writer sees of what others commit while its transaction is under way, on servers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pydedup.adapter import Adapter
from pydedup.testing._contract_base import in_thread, open_store


@pytest.mark.parametrize("backend", ["postgres", "mysql"])
def test_a_writer_sees_what_others_have_committed(
    backend: str, new_store: Callable[[str], str]
) -> None:
    """Also where it has read before: what came while it waited is matched, not stored again."""
    adapter = open_store(new_store(backend))

    def put_job(adapter: Adapter) -> None:
        with adapter.transaction():
            adapter.put_job("of another", "", "", "")

    with adapter.transaction():
        assert adapter.jobs() == []
        in_thread(lambda: put_job(adapter))
        assert len(adapter.jobs()) == 1
    adapter.close()
