# SPDX-License-Identifier: Apache-2.0
"""The suite that every database adapter must pass.

Subclass :class:`AdapterContract`, give the place and a way to look behind the adapter's back,
and pytest does the rest::

    class TestMyDatabase(AdapterContract):
        def make_url(self, folder): ...
        def with_lock_wait(self, url, seconds): ...
        def raw_rows(self, url, table, columns): ...

Tests ask for :class:`pydedup.adapter.Capabilities`, never for the name of a database. What a
database does beyond the contract is tested beside it.
"""

from __future__ import annotations

from pydedup.testing._contract_blocks import BlocksContract
from pydedup.testing._contract_marks import MarksContract
from pydedup.testing._contract_pages import PagesContract
from pydedup.testing._contract_processes import ProcessesContract
from pydedup.testing._contract_rows import RowsContract
from pydedup.testing._contract_schema import SchemaContract
from pydedup.testing._contract_transactions import TransactionsContract

__all__ = ["AdapterContract"]


class AdapterContract(
    SchemaContract,
    ProcessesContract,
    TransactionsContract,
    MarksContract,
    RowsContract,
    BlocksContract,
    PagesContract,
):
    """All of it. Pytest takes bases from the last to the first: binary round trips lead."""
