# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests, ours and those of packages that extend pydedup.

- :mod:`pydedup.testing.adapter_contract`: the suite that every database adapter must pass.
- :mod:`pydedup.testing.rows_contract`: those for tables of users, where an adapter knows them.
- :mod:`pydedup.testing.functions_contract`: those for functions inside of a server.
- :mod:`pydedup.testing.faults`: an adapter that fails where a test wants it to.
- :mod:`pydedup.testing.crash`: ends a process in a chosen phase of what it does to a store.
- :mod:`pydedup.testing.program`: the program, in a process or in that of the tests.
- :mod:`pydedup.testing.proxy`: cuts connections to a server in the middle of an answer.
- :mod:`pydedup.testing.servers`: private PostgreSQL and MariaDB servers.
- :mod:`pydedup.testing.pages`: smaller pages, so that little data spans several.
- :mod:`pydedup.testing.memory_pages`: matrices on pages in memory, without a database.

Nothing is imported here: the modules need pytest, which users of pydedup may not have.
"""
