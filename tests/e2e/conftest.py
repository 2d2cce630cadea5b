# SPDX-License-Identifier: Apache-2.0
"""Damage to stores, the same on every back end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pydedup import registry


@pytest.fixture
def change_page() -> Callable[[str, int, Callable[[bytearray], Any]], None]:
    """Change the stored bytes of a page, as a failing disk does: nothing else is told."""

    def change(url: str, page_id: int, what: Callable[[bytearray], Any]) -> None:
        adapter: Any = registry.connect(url, mode="a")
        try:
            ((_, payload),) = adapter.read_pages([page_id])
            changed = bytearray(payload)
            what(changed)
            pages, mark = adapter._sql.dialect.name("pages"), adapter._sql.dialect.placeholder
            with adapter.transaction():
                adapter._write(
                    f"UPDATE {pages} SET payload = {mark} WHERE id = {mark}",  # noqa: S608
                    [bytes(changed), page_id],
                )
        finally:
            adapter.close()

    return change
