# SPDX-License-Identifier: Apache-2.0
"""What a shell offers at the Tab key: files, stores, and the models of the store that was typed.

Whoever types must not wait, nor see an error: a store that does not answer at once, or cannot be
read, has no models to offer, and nothing is printed but what is offered.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    shell_complete,
    split_arg_string,
)

import pydedup
from pydedup.text import clean

if TYPE_CHECKING:
    from pydedup import Store
    from pydedup.types import ModelInfo

__all__ = [
    "COMPLETE_VARIABLE",
    "answer_shell",
    "complete_aliases",
    "complete_files",
    "complete_models",
    "complete_sources",
    "complete_stores",
    "complete_tensors",
    "complete_versions",
]

#: Set by the scripts with which shells complete commands.
COMPLETE_VARIABLE = "_PYDEDUP_COMPLETE"
#: Seconds that a store may take to say what it has.
_PATIENCE = 1.5
_ASKING = "completing"
_SQLITE = "sqlite:///"
_MAGIC = b"SQLite format 3\0"

#: Beyond what the script of click does, it hands over the line as it was typed: bash splits words
#: at ':', '=' and '@', which URLs and models are full of, and wants back what follows the last one.
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' type value completion
    for completion in $(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" \\
            COMP_WORDBREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete "$1"); do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            file) compopt -o default ;;
            part) COMPREPLY+=("$value"); compopt -o nospace ;;
            *) COMPREPLY+=("$value") ;;
        esac
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


def answer_shell(program: click.Command, instruction: str) -> int:
    """Print the script that makes a shell complete, or what it asks for."""
    add_completion_class(_Bash)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        status = shell_complete(program, {}, "pydedup", COMPLETE_VARIABLE, instruction)
    sys.stdout.flush()
    if any(thread.name == _ASKING for thread in threading.enumerate()):
        os._exit(status)  # what does not answer is not waited for
    return status


class _Bash(BashComplete):
    """Completion for bash, of words that have ':', '=' or '@' in them."""

    source_template = _BASH
    #: The beginning of a word that bash keeps, and the quote that the word has not closed.
    _kept, _quote = "", ""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one at the cursor, and that one, as far as it goes."""
        line = os.environ.get("COMP_LINE")
        if line is None:  # a script that click made
            return super().get_completion_args()
        *words, last = split_arg_string(f"{line}\0")  # which no line has
        while words and re.match(r"\w+=", words[0]):  # variables for the program
            del words[0]
        word, self._quote, start = _last_word(line)
        if not self._quote:
            breaks = os.environ.get("COMP_WORDBREAKS", "")
            # Of '@' and '$', bash wants back the character itself as well.
            ends = [n + (char not in "@$") for n, char in enumerate(word) if char in breaks]
            start = max(ends, default=0)
        self._kept = "".join(split_arg_string(word[:start]))
        return words[1:], last.rstrip("\0")

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return an offer as the script reads it: what follows what bash keeps, in its quotes."""
        if item.type != "plain":
            return f"{item.type},{item.value}"
        value = item.value.removeprefix(self._kept)
        if self._quote == "":
            value = re.sub(r"([^\w@%+=:,./~-])", r"\\\1", value)
        elif self._quote == '"':
            value = re.sub(r'(["\\$`])', r"\\\1", value)
        return f"{'part' if item.part else 'plain'},{value}"


def _last_word(line: str) -> tuple[str, str, int]:
    """Return the word that a line ends in, the quote that it leaves open, and where that begins."""
    start, quote, opened, escaped = 0, "", 0, False
    for place, char in enumerate(line):
        if escaped or (char == "\\" and quote != "'"):
            escaped = not escaped
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote, opened = char, place + 1
        elif char.isspace():
            start = place + 1
    return line[start:], quote, opened - start


def complete_files(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Offer what may be a file and need not be one, such as a store."""
    return [CompletionItem(incomplete, type="file")]


def complete_stores(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Offer files, and behind ``sqlite:///`` folders and databases as URLs."""
    if not incomplete.startswith(_SQLITE):
        if _SQLITE.startswith(incomplete) and incomplete.startswith("sqlite"):
            return [CompletionItem(_SQLITE, part=True)]
        return complete_files(context, param, incomplete)
    folder, slash, start = incomplete.removeprefix(_SQLITE).rpartition("/")
    found = []
    with contextlib.suppress(OSError), os.scandir(f"{folder}/" if slash else ".") as entries:
        for entry in entries:
            if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
                url = f"{_SQLITE}{folder}{slash}{entry.name}"
                if entry.is_dir():
                    found.append(CompletionItem(f"{url}/", part=True))
                elif _is_database(entry.path):
                    found.append(CompletionItem(url))
    return sorted(found, key=lambda item: item.value)


def complete_models(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Offer the names of the models in the store, and the versions and aliases of one."""
    name, at, _ = incomplete.partition("@")
    models = _models(context, name if at else None)
    names = {model.name for model in models if model.name.startswith(name)}
    offered = set() if at else names
    if at or len(names) == 1:
        for model in models:
            if model.name in names and (not at or model.name == name):
                offered.update(f"{model.name}@{one}" for one in (model.version, *model.aliases))
    return _offer(offered, incomplete)


def complete_aliases(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Offer the aliases of the model that was named."""
    return _offer({one for model in _versions(context) for one in model.aliases}, incomplete)


def complete_versions(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Offer the versions of the model that was named."""
    return _offer({model.version for model in _versions(context)}, incomplete)


def complete_tensors(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Offer the tensors of the model that was named."""
    name = _word(context, "name", 1)
    found: list[str] = []
    if name:
        _ask(context, lambda store: found.extend(one.name for one in store.info(name).tensors))
    return _offer(set(found), incomplete)


def complete_sources(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Offer models and files in turns, as they come in pairs."""
    complete = (
        complete_files if len(context.params.get(str(param.name)) or ()) % 2 else complete_models
    )
    return complete(context, param, incomplete)


def _ask(context: click.Context, question: Callable[[Store], object]) -> None:
    """Ask the store that was typed, if it is there and answers soon."""
    url = _word(context, "url", 0)

    def ask() -> None:
        with (
            contextlib.suppress(Exception),
            pydedup.open(url or "", mode="r", memory="4MiB") as store,
        ):
            question(store)

    if url is not None:
        thread = threading.Thread(target=ask, name=_ASKING, daemon=True)
        thread.start()
        thread.join(_PATIENCE)


def _word(context: click.Context, name: str, place: int) -> str | None:
    """Return an argument that was typed. Click reads none before an option without a value."""
    found = context.params.get(name) or dict(enumerate(context.args)).get(place)
    return found if isinstance(found, str) else None


def _models(context: click.Context, name: str | None) -> list[ModelInfo]:
    """Return all models of the store, or the versions of one, which may be one of thousands."""
    found: list[ModelInfo] = []
    _ask(context, lambda store: found.extend(store.versions(name) if name else store.models()))
    return found


def _versions(context: click.Context) -> list[ModelInfo]:
    name = _word(context, "name", 1)
    return _models(context, name) if name else []


def _offer(words: Iterable[str], incomplete: str) -> list[CompletionItem[str]]:
    return [
        CompletionItem(word)
        for word in sorted(words)
        if word.startswith(incomplete) and word == clean(word)
    ]


def _is_database(path: str) -> bool:
    with contextlib.suppress(OSError), Path(path).open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC
    return False
