# SPDX-License-Identifier: Apache-2.0
"""Adapters to databases; empty on purpose, so that importing it loads no driver.

A database has the file of its URL's scheme, and its own private files beside it (``_sqlite_*``,
``_mysql_*``, ``_postgres_*``; ``_shard*`` are of ``postgres_shards``). All others are shared:
``_schema`` and ``_sql`` are the tables and statements, ``_base``, ``_catalog``, ``_migrations`` and
``_dbapi`` the calls of the protocol, one on top of the other, ``_again`` what servers add to them,
``_rows`` and ``_select`` those on tables of users, ``_connection`` and ``_sessions`` the
connections, ``_values``, ``_damage`` and ``_errors`` what comes from them, ``_files`` and ``_url``
what URLs say. Authors of further adapters use ``dbapi``.
"""
