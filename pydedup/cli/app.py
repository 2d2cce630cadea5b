# SPDX-License-Identifier: Apache-2.0
"""The program: its commands in groups, its help, and the one place where exceptions end."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence

import click

from pydedup.cli import (
    adding,
    comparing,
    demo,
    interrupt_in,
    looking,
    moving,
    naming,
    options,
    predicting,
    reporting,
    scoring,
    serving,
    sql,
    taking,
    tenants,
    top,
    upkeep,
)
from pydedup.cli.completing import COMPLETE_VARIABLE, answer_shell
from pydedup.cli.errors import TRACEBACK_VARIABLE, Exit, report, warn, warnings_told
from pydedup.cli.signals import interruptible

__all__ = ["main", "program"]

#: Commands as ``pydedup --help`` lists them.
SECTIONS: tuple[tuple[str, tuple[click.Command, ...]], ...] = (
    ("Models in and out", (adding.add, taking.load, taking.export)),
    ("Predicting", (predicting.predict, scoring.score, serving.serve, top.top, sql.sql)),
    (
        "Looking",
        (
            looking.ls,
            looking.info,
            looking.stats,
            comparing.explain,
            comparing.diff,
            reporting.report,
        ),
    ),
    ("Names", (naming.alias, naming.rm)),
    ("Moving", (moving.copy, moving.backup, moving.restore)),
    ("Upkeep", (upkeep.verify, upkeep.refill, upkeep.vacuum, tenants.quota)),
    ("pydedup itself", (demo.demo, looking.kernels)),
)

_EXAMPLES = (
    "pydedup add sqlite:///models.db sentiment@1 sentiment.safetensors",
    "pydedup ls sqlite:///models.db",
    "pydedup export sqlite:///models.db sentiment@1 back.safetensors",
)


class Program(options.Group):
    """The group of all commands."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands in their sections."""
        widest = max(len(name) for name in self.commands)
        for title, commands in SECTIONS:
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (str(command.name).ljust(widest), command.get_short_help_str(100))
                        for command in commands
                    ]
                )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show examples and exit statuses."""
        with formatter.section("Examples"):
            for line in _EXAMPLES:
                formatter.write_text(line)
        with formatter.section("Exit status"):
            formatter.write_dl([(str(status.value), status.meaning) for status in Exit])
        with formatter.section("Environment"):
            formatter.write_dl(
                [
                    ("PYDEDUP_KERNEL", "demands a kernel by name, e.g. scalar"),
                    ("PYDEDUP_THREADS", "how many threads compute; by default one per core"),
                    (serving.TOKEN_VARIABLE, "what clients of serve must send as a bearer token"),
                    ("PYDEDUP_CACHE", "where demo keeps what it downloads"),
                    (TRACEBACK_VARIABLE, "1 shows the tracebacks of errors"),
                    ("NO_COLOR", "any value turns colours off"),
                    ("FORCE_COLOR", "any value turns colours on"),
                ]
            )


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    subcommand_metavar="COMMAND [ARGUMENTS]...",
)
@click.version_option(package_name="pydedup", message="pydedup %(version)s")
def program() -> None:
    """Store families of similar deep-learning models once, in a database, and predict from it.

    Each command takes the store first: a URL such as sqlite:///models.db (sqlite:////abs/models.db
    for an absolute path), or the path of a SQLite file. A model is addressed as NAME (its newest
    version), NAME@VERSION or NAME@ALIAS. Commands that print data print JSON with --json.
    """


for _, _commands in SECTIONS:
    for _command in _commands:
        program.add_command(_command)


_STANDARD_OUTPUT = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status (`errors.Exit`).

    Parameters
    ----------
    arguments
        What follows the program's name; by default what the process was given.
    """
    _prepare_streams()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they address developers; users get results or errors
    if instruction := os.environ.get(COMPLETE_VARIABLE):
        return answer_shell(program, instruction)
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    context: click.Context | None = None
    try:
        with interruptible(
            lambda: _say_interrupted(context), to_the_end=arguments is None
        ) as signals:
            status: int | None = Exit.OK
            try:
                with warnings_told(), program.make_context("pydedup", words) as context:
                    status = program.invoke(context)
                sys.stdout.flush()
            except click.exceptions.Exit as error:
                status = error.exit_code
            except BaseException as error:
                number = signals.of(error)
                if number and arguments is None:
                    _drop_output()  # nobody waits for a reader who does not read
                if number or isinstance(error, click.Abort):
                    _say_interrupted(context)
                    status = Exit.of_signal(number or signal.SIGINT)
                elif isinstance(error, BrokenPipeError):
                    status = Exit.BROKEN_PIPE
                elif isinstance(error, Exception):
                    status = report(error)
                else:
                    raise
            return _flush(int(status or Exit.OK))
    except Exception as error:  # that signals are looked after takes a thread
        if interrupt_in(error) is not None:
            raise
        return _flush(report(error))


#: What is true after Ctrl-C where it is not that nothing has changed. It may come when all is
#: done and about to be printed.
_INTERRUPTED = {
    "add": "either everything was added or nothing; `pydedup ls` shows which",
    "rm": "either everything was removed or nothing; `pydedup ls` shows which",
    "alias": "the aliases may have changed; `pydedup ls` shows them",
    "quota": "the quota may have changed; `pydedup quota` shows it",
    "score": "what was written is there; run it again to continue",
    "copy": "what was copied is there; run it again to continue",
    "backup": "there is no new file yet; run it again to continue",
    "restore": "what was restored is there; run it again to continue",
    "verify": "no model has changed",
    "refill": "what was put back is there; run it again to continue",
    "vacuum": "all models are as they were before; the next vacuum does what is left",
    "demo": "what was downloaded is kept for the next time",
}


def _say_interrupted(context: click.Context | None) -> None:
    command = "" if context is None else context.invoked_subcommand or ""
    warn("interrupted, " + _INTERRUPTED.get(command, "the store is as it was before"))


def _prepare_streams() -> None:
    """Make printing safe: an output that is closed or raw, names its encoding lacks, no columns."""
    _occupy_streams()
    own = sys.__stdout__
    if sys.stdout is None:
        closed = io.FileIO(_STANDARD_OUTPUT, "wb", closefd=False)
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(closed), "utf-8")
    elif own is not None and own is sys.stdout and isinstance(own.buffer, io.RawIOBase):
        # As PYTHONUNBUFFERED has it: a full disk or a pipe may take a part, and nobody hears of it.
        whole = io.BufferedWriter(io.FileIO(own.fileno(), "wb", closefd=False))
        sys.stdout = io.TextIOWrapper(whole, own.encoding, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name in ("COLUMNS", "LINES"):
        said = os.environ.get(name, "")
        if not (said.isascii() and said.isdigit() and said.strip("0")):
            os.environ.pop(name, None)  # 0 is unknown, and rich takes it, and "²" for a number


def _occupy_streams() -> None:
    """Let no file that is opened get the number of a stream that is closed, for what libraries say.

    What is written to such an output then fails, as it does with other programs.
    """
    for number in (0, _STANDARD_OUTPUT, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one.
            os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY)


def _flush(status: int) -> int:
    """Write out what is left. Where that fails, Python must not try again when it exits."""
    try:
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        failed: int = Exit.BROKEN_PIPE
    except OSError as error:
        failed = status if status else report(error)
    _drop_output()
    return failed


def _drop_output() -> None:
    """Write what is left of the output nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
