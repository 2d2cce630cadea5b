# SPDX-License-Identifier: Apache-2.0
"""``pydedup sql``: functions inside of a PostgreSQL server that predict."""

from __future__ import annotations

import click

from pydedup import registry
from pydedup.adapter_options import FunctionsAdapter
from pydedup.cli import options, output
from pydedup.errors import ArgumentError

__all__ = ["sql"]

_path_option = click.option(
    "--python-path",
    metavar="FOLDER",
    help="Folder on the server where its Python finds pydedup, if that is no usual place.",
)


@click.group(
    cls=options.Group,
    short_help="Functions inside of PostgreSQL that predict.",
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGUMENTS]...",
)
@click.pass_context
def sql(context: click.Context) -> None:
    """Functions inside of a PostgreSQL server that predict with the models of a store.

    They are written in PL/Python (plpython3u) and live in the store's schema:
    pydedup_predict(model, f1, ...) and others. For SQLite, use pydedup.sql.register: see
    docs/scoring.md.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())  # as `pydedup` alone does


@sql.command(short_help="Make the functions.")
@options.store_argument
@_path_option
@options.json_option
def install(url: str, python_path: str | None, as_json: bool) -> None:
    """Make the functions in the schema of STORE, or replace those of an earlier version.

    Needs a superuser, since what is written in PL/Python runs with the rights of the server's own
    account. The Python of the server must find pydedup: install it for that Python into a folder
    (python3 -m pip install --target FOLDER . in a checkout) and name the folder with --python-path.
    """
    options.read_store(url).close()
    with registry.opened(url, mode="a") as adapter:
        version = _functions(adapter).install_functions(python_path)
        where = adapter.url
    if as_json:
        output.emit_json({"store": where, "version": version})
        return
    output.print_note(f"functions of pydedup {version} are in {where}")


@sql.command(short_help="Remove the functions again.")
@options.store_argument
@options.json_option
def uninstall(url: str, as_json: bool) -> None:
    """Remove the functions from the schema of STORE; models and the language PL/Python stay."""
    options.read_store(url).close()
    with registry.opened(url, mode="a") as adapter:
        _functions(adapter).drop_functions()
        where = adapter.url
    if as_json:
        output.emit_json({"store": where})
        return
    output.print_note(f"functions are gone from {where}")


@sql.command(short_help="Print the SQL that makes the functions.")
@options.store_argument
@_path_option
@options.json_option
def show(url: str, python_path: str | None, as_json: bool) -> None:
    """Print the SQL that `pydedup sql install` runs, for an administrator to read or to run."""
    with registry.opened(url, mode="r") as adapter:
        statements = _functions(adapter).function_statements(python_path)
        where = adapter.url
    if as_json:
        output.emit_json({"store": where, "statements": list(statements)})
        return
    for statement in statements:
        click.echo(f"{statement};")


def _functions(adapter: object) -> FunctionsAdapter:
    if isinstance(adapter, FunctionsAdapter):
        return adapter
    raise ArgumentError(
        "only PostgreSQL has functions inside of the server; in SQLite, pydedup.sql.register adds "
        "them to a connection, and pydedup score works with every database"
    )
