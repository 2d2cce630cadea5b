# SPDX-License-Identifier: Apache-2.0
"""What tests that kill have in common."""

from __future__ import annotations

import pytest

from pydedup.ingest import pages
from pydedup.maintenance import repack, repair, vacuum


@pytest.fixture(autouse=True)
def bounds_of_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what is made small for small data, where that ran in this process too."""
    for module in (pages, repack, repair):
        monkeypatch.setattr(module, "PAGES_PER_TRANSACTION", module.PAGES_PER_TRANSACTION)
    monkeypatch.setattr(vacuum, "_ROWS_PER_TRANSACTION", vacuum._ROWS_PER_TRANSACTION)
