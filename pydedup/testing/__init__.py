# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests, ours and those of packages that extend pydedup.

- :mod:`pydedup.testing.adapter_contract`: the suite that every database adapter must pass.
- :mod:`pydedup.testing.rows_contract`: those for tables of users, where an adapter knows them.
- :mod:`pydedup.testing.functions_contract`: those for functions inside of a server.
- :mod:`pydedup.testing.faults`: an adapter that fails where a test wants it to.
- :mod:`pydedup.testing.crash`: ends a process in a chosen phase of what it does to a store.
- :mod:`pydedup.testing.program`: the program, in a process or in that of the tests.
- :mod:`pydedup.testing.proxy`: cuts connections to a server in the middle of an answer.
- :mod:`pydedup.testing.servers`: private PostgreSQL servers.
- :mod:`pydedup.testing.mysql_servers`: those of MariaDB, or MySQL.
- :mod:`pydedup.testing.pages`: smaller pages, so that little data spans several.
- :mod:`pydedup.testing.memory_pages`: matrices on pages in memory, without a database.
- :mod:`pydedup.testing.graphs`: graphs computed in numpy, by the definitions.
- :mod:`pydedup.testing.kernels`: each kernel in a process of its own.
- :mod:`pydedup.testing.resident`: how much memory a process takes at most.
- :mod:`pydedup.testing.shards`: places for sharded stores, and a look behind the adapter.
- :mod:`pydedup.testing.serving`: `pydedup serve` as a child process, and plain requests to it.
- :mod:`pydedup.testing.browser`: a headless Chromium.
- :mod:`pydedup.testing.disks`: a small disk, to be filled or made read-only.

Nothing is imported here: the modules need pytest, which users of pydedup may not have.
"""
