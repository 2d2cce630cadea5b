# SPDX-License-Identifier: Apache-2.0
"""Arguments and options that several commands share, and how a command gets its store."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

import pydedup
from pydedup import Store, config
from pydedup.cli.completing import complete_files, complete_models, complete_stores
from pydedup.cli.errors import no_such
from pydedup.cli.progress import Watch
from pydedup.errors import (
    ArgumentError,
    FormatError,
    MissingStoreError,
    NotFoundError,
    SchemaVersionError,
)
from pydedup.names import parse_address
from pydedup.types import ModelInfo
from pydedup.words import OpenMode

__all__ = [
    "Group",
    "existing_store",
    "file_option",
    "is_missing",
    "json_option",
    "load_function",
    "meant_by",
    "memory_option",
    "model_argument",
    "number_option",
    "on_option",
    "parse_block_shape",
    "quiet_option",
    "read_store",
    "size_option",
    "store_argument",
    "target_argument",
    "trial_store",
    "writable_store",
]

_F = TypeVar("_F", bound=Callable[..., Any])

DEFAULT_MEMORY = "512MiB"


class Group(click.Group):
    """A group of commands."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; what was meant is guessed, and no URL is repeated."""
        word = args[0]
        is_guessed = not word.startswith("-") and not ctx.resilient_parsing  # no shell completes
        if self.get_command(ctx, word) is None and is_guessed:
            if "://" in word:
                order = f"{ctx.command_path} COMMAND STORE ..."
                raise click.UsageError(f"the command comes first, then the store: {order}", ctx)
            raise click.UsageError(no_such("command", word, self.commands), ctx)
        return super().resolve_command(ctx, args)


def is_missing(path: str | os.PathLike[str]) -> bool:
    """Return whether nothing is there. Raises FormatError where that cannot be told."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError as error:  # a folder that is closed to this user, a name too long
        reason = error.strerror
        raise FormatError(f"{os.fspath(path)!r:.200} cannot be read: {reason}") from None
    return False


class _FileToRead(click.Path):
    """A file that an option names; a missing one is no wrong command line, but not found."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """Return the path."""
        if param is not None and is_missing(value):
            raise NotFoundError(f"{param.opts[0]}: there is no file {os.fspath(value)!r}")
        return super().convert(value, param, ctx)


def load_function(place: str) -> Callable[..., Any]:
    """Return the function that MODULE:FUNCTION names; modules of the current folder come first.

    Where it calls ``sys.exit``, that is an error of its own: the command would end in silence, and
    with its status.
    """
    module, colon, name = place.partition(":")
    if not colon or not module or not name:
        raise _bad_function(f"{place!r} is not MODULE:FUNCTION, such as metrics:accuracy")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with prints_apart():
            found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        file = f"; a file is named without .py, as {module[:-3]}:{name}"
        hint = file if module.endswith(".py") else ""
        raise _bad_function(f"cannot import {module!r}: {error}{hint}") from None
    except (Exception, SystemExit) as error:  # a user's code raises what it likes
        said = f"{type(error).__name__}: {error}"
        raise _bad_function(f"importing {module!r} failed: {said}") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise _bad_function(f"{module!r} has no function {name!r}")
    return functools.partial(_without_exit, found)


def prints_apart() -> contextlib.AbstractContextManager[Any]:
    """Send what a user's function prints to standard error, away from the result."""
    return contextlib.redirect_stdout(sys.stderr)


def _without_exit(function: Callable[..., Any], *given: Any) -> Any:
    """Call a user's function; raises RuntimeError where it would end the program."""
    try:
        return function(*given)
    except SystemExit as error:
        raise RuntimeError(f"it called sys.exit({error.code!r})") from error


def _bad_function(what: str) -> click.BadParameter:
    return click.BadParameter(what, param_hint="'--evaluate'")


def _check_size(context: click.Context, option: click.Parameter, value: str) -> str:
    """Refuse under the option's own name what is no size, or too little memory; a callback."""
    parse = config.parse_memory if option.name == "memory" else config.parse_bytes
    try:
        parse(value)
    except ArgumentError as error:
        raise click.BadParameter(str(error), context, option) from None
    return value


def _no_stdout(context: click.Context, argument: click.Parameter, value: str) -> str:
    """Refuse what means standard output elsewhere, and would name a file here; a callback."""
    if value == "-":
        raise click.BadParameter(
            "this is not written to standard output; name a file (./- is one called so)",
            context,
            argument,
        )
    return value


def target_argument(metavar: str) -> Callable[[_F], _F]:
    """Return the argument ``path`` for what is written as a file or a folder."""
    return click.argument(
        "path", metavar=metavar, callback=_no_stdout, shell_complete=complete_files
    )


def number_option(
    name: str, metavar: str, kind: click.IntRange | click.FloatRange, default: float, help: str
) -> Callable[[_F], _F]:
    """Return an option that is a number, and has one by default."""
    return click.option(
        name, metavar=metavar, type=kind, default=default, show_default=True, help=help
    )


def size_option(name: str, default: str, help: str) -> Callable[[_F], _F]:
    """Return an option that is a number of bytes, such as 64MiB; the command gets it as written."""
    return click.option(
        name, metavar="SIZE", default=default, show_default=True, callback=_check_size, help=help
    )


def file_option(name: str, help: str) -> Callable[[_F], _F]:
    """Return an option that is a file to be read."""
    return click.option(name, metavar="FILE", type=_FileToRead(), help=help)


def on_option(what: str) -> Callable[[_F], _F]:
    """Return the option for the Ray cluster that does the work; without it, none does."""
    return click.option(
        "--on",
        metavar="WHERE",
        help=f"{what} Ray: 'local', 'auto', host:6379 or ray://host:10001 (docs/ray.md).",
    )


#: The store, the first argument of nearly every command.
store_argument = click.argument("url", metavar="STORE", shell_complete=complete_stores)
#: The address of a model.
model_argument = click.argument("name", metavar="NAME", shell_complete=complete_models)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document; sizes are in bytes."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
memory_option = size_option("--memory", DEFAULT_MEMORY, "Memory for pages of the store.")


def _opened(url: str, mode: OpenMode, memory: str) -> Store:
    """Open a store; where its database takes long to answer, that is seen."""
    context = click.get_current_context(silent=True)
    quiet = context is not None and context.params.get("quiet", False)
    with contextlib.ExitStack() as unless_all_is_well:
        with Watch("opening the store", quiet=quiet):
            store = unless_all_is_well.enter_context(pydedup.open(url, mode=mode, memory=memory))
        unless_all_is_well.pop_all()
    return store


def read_store(url: str, memory: str = DEFAULT_MEMORY) -> Store:
    """Open a store for reading; a mistyped URL creates nothing."""
    try:
        return _opened(url, "r", memory)
    except MissingStoreError:
        context = click.get_current_context(silent=True)
        given = {} if context is None else context.params
        name = given.get("name") or given.get("first") or ""
        if "://" in name or Path(name).is_file():
            raise click.UsageError(f"the store comes first: {name!r} {url!r}") from None
        raise


def writable_store(url: str, memory: str = DEFAULT_MEMORY) -> Store:
    """Open a store for writing, or create it."""
    return _opened(url, "a", memory)


def existing_store(url: str, memory: str = DEFAULT_MEMORY) -> Store:
    """Open a store for writing that must be there: removing from a new one makes no sense."""
    with contextlib.suppress(SchemaVersionError):  # of an older one: to be migrated
        read_store(url).close()
    return writable_store(url, memory)


@contextlib.contextmanager
def trial_store(url: str, memory: str = DEFAULT_MEMORY) -> Iterator[Store]:
    """Open a store for a dry run: the one that is there, else an empty one that goes away."""
    try:
        store = read_store(url, memory)
    except MissingStoreError as error:
        if error.hindrance:
            raise
    else:
        with store:
            yield store
        return
    with (
        tempfile.TemporaryDirectory(prefix="pydedup-") as folder,
        writable_store(str(Path(folder) / "dry-run.db"), memory) as store,
    ):
        yield store


def meant_by(store: Store, name: str) -> Sequence[ModelInfo]:
    """Return the versions that NAME means: all of a model, or the one of a version or an alias."""
    address = parse_address(name)
    return store.versions(address.name) if address.selector is None else [store.info(name).info]


def parse_block_shape(text: str) -> tuple[int, int]:
    """Parse e.g. ``64x64``."""
    match = re.fullmatch(r"([1-9]\d{0,8})[xX]([1-9]\d{0,8})", text.strip(), re.ASCII)
    if match is None:
        raise click.BadParameter(f"{text!r} is no block shape; write ROWSxCOLUMNS, e.g. 64x64")
    return int(match.group(1)), int(match.group(2))
