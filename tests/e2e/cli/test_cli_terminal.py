# SPDX-License-Identifier: Apache-2.0
"""How it looks: on terminals of any width, in pipes, without colour, in poor locales."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import text
from pydedup.cli import output, tables
from pydedup.testing.program import PROGRAM, run_here
from pydedup.testing.terminal import environment, read_all, run_on_terminal

LONG = "encoder.layer.11.attention.self.query.weight"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = f"sqlite:///{tmp_path_factory.mktemp('s') / 's.db'}"
    with pydedup.open(found) as store:
        arrays = {LONG: np.arange(60000, dtype=np.float32).reshape(300, 200), "bias": np.ones(200)}
        store.add("sentiment-classifier-for-film-reviews@2026-01-31", arrays)
        store.add("small@1", {"bias": np.ones(200)}, metadata={"note": "plain words " * 20})
        store.alias("small", "prod", "1")
    return found


def on_terminal(*words: str, columns: int = 80, answer: str = "", **extra: str) -> tuple[int, str]:
    """Run the program on a terminal of its own; returns its status and all that it wrote."""
    return run_on_terminal([*PROGRAM, *words], columns, answer, **extra)


def in_pipe(*words: str, **extra: str) -> str:
    done = subprocess.run(
        [*PROGRAM, *words],
        capture_output=True,
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        check=True,
    )
    assert done.stderr == b""
    return done.stdout.decode()


def plain(shown: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "").splitlines()


#: Runs commands one after the other; a process for each would be started for most of the time.
#: None shows how far it is, as each does once it takes a moment.
_IN_TURN = """
import json, sys
from pydedup.cli import main, progress
progress._DELAY_SECONDS = 1000
for words in json.loads(sys.argv[1]):
    print("status", main(words))
"""


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_no_line_is_wider_than_the_terminal(columns: int, url: str) -> None:
    commands = [
        ["ls", url],
        ["info", url, "small"],
        ["info", url, "sentiment-classifier-for-film-reviews", "--tensors"],
        ["explain", url, "sentiment-classifier-for-film-reviews"],
        ["load", url, "sentiment-classifier-for-film-reviews"],
    ]
    command = [sys.executable, "-P", "-c", _IN_TURN, json.dumps(commands)]
    status, shown = run_on_terminal(command, columns)
    assert status == 0
    lines = plain(shown)
    ends = [number for number, line in enumerate(lines) if line == "status 0"]
    assert len(ends) == len(commands)
    assert all(end - start > 1 for start, end in itertools.pairwise([-1, *ends]))
    # Words are never broken: a digest or a name alone in its line may be wider.
    assert [line for line in lines if len(line) > columns and len(line.split()) > 1] == []
    for words in commands:
        piped = run_here(*words, env={"COLUMNS": "60"})
        assert (piped.returncode, piped.stderr) == (0, "")
        lines = piped.stdout.splitlines()
        assert [line for line in lines if len(line) > 60 and len(line.split()) > 1] == []


def test_a_narrow_table_becomes_a_list_that_loses_nothing(url: str) -> None:
    shown = in_pipe("ls", url, COLUMNS="30")
    for word in ("sentiment-classifier-for-film-reviews@2026-01-31", "lossless", "saved", "prod"):
        assert word in shown
    assert "…" not in shown


def test_names_are_not_shortened_to_one(tmp_path: Path) -> None:
    """Of a transformer, each layer was encoder.la…ery.weight."""
    store_url = f"sqlite:///{tmp_path / 's.db'}"
    names = [LONG.replace("11", str(layer)) for layer in (11, 12)]
    with pydedup.open(store_url) as store:
        store.add("net", {name: np.ones(9) for name in names})
    shown = in_pipe("explain", store_url, "net", COLUMNS="40")
    assert all(f"{name}\n  blocks " in shown for name in names)
    with_room = in_pipe("explain", store_url, "net", COLUMNS="60")
    first, second = (line.split()[0] for line in with_room.splitlines()[-2:])
    assert "…" in first != second
    assert "\n  blocks" not in with_room


def test_a_pipe_gets_whole_lines_without_escapes(url: str) -> None:
    shown = in_pipe("ls", url)
    assert "\x1b" not in shown
    assert "…" not in shown
    assert "sentiment-classifier-for-film-reviews@2026-01-31" in shown
    # An unknown width, of which nothing was printed, and a digit that is no number.
    assert in_pipe("ls", url, COLUMNS="0") == shown
    assert in_pipe("ls", url, COLUMNS="²", LINES="²") == shown
    assert all(line == line.rstrip() for line in shown.splitlines())
    header, first, second, _ = shown.splitlines()
    assert header.index("Size") + len("Size") == first.index("iB") + 2 == second.index("iB") + 2
    assert LONG in in_pipe("info", url, "sentiment-classifier-for-film-reviews", "--tensors")


def test_a_terminal_gets_colours_unless_they_are_not_wanted(url: str) -> None:
    assert "\x1b[36m" in on_terminal("ls", url)[1]
    without = on_terminal("ls", url, NO_COLOR="1")[1]
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", without)
    assert "\x1b[36m" in in_pipe("ls", url, FORCE_COLOR="1")


def test_locales_that_lack_letters(url: str) -> None:
    shown = in_pipe("ls", url, PYTHONIOENCODING="ascii", COLUMNS="60")
    assert shown.isascii()
    header, first, *_ = shown.splitlines()
    assert "..." in first
    assert "\\u" not in first  # which is longer than what it stands for
    assert header.index("Size") + len("Size") == first.index("iB") + 2
    # A name that the encoding lacks is as long as its escapes.
    for name in ("größe", "模型"):
        with pydedup.open(url) as store:
            store.add(name, {"w": np.ones(3)})
        found = in_pipe("ls", url, name, PYTHONIOENCODING="ascii").splitlines()
        assert found[0].index("Size") + len("Size") == found[1].index("24 B") + len("24 B")
        with pydedup.open(url) as store:
            store.remove(name)


def test_rm_asks_on_a_terminal(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    with pydedup.open(url) as store:
        store.add("m@1", {"w": np.ones(3)})
        store.add("n@1", {"w": np.ones(3)})
    status, shown = on_terminal("rm", url, "m", answer="n\n")
    assert status == 1
    assert "Remove m@1 (24 B) from" in shown
    assert "nothing was removed" in shown
    status, shown = on_terminal("rm", url, "m", answer="y\n")
    assert status == 0
    assert "removed m@1" in shown
    status, shown = on_terminal("rm", url, "n", "--yes")
    assert status == 0
    assert "removed n@1" in shown  # below a bar, where the machine is slow
    assert "Remove" not in shown
    with pydedup.open(url) as store:
        for version in ("1", "2", "3", "4"):
            store.add("m", {"w": np.ones(3)}, version=version)
        store.alias("m", "prod", "2")
    status, shown = on_terminal("rm", url, "m", "--keep", "1", answer="n\n")
    assert status == 1
    assert "Remove m@1, m@3 (48 B) from" in shown
    status, shown = on_terminal("rm", url, "m", "--keep", "3", answer="y\n")
    assert (status, "removed m@1" in shown) == (0, True)
    status, shown = on_terminal("rm", url, "m", "--keep", "4")
    assert (status, "Remove" in shown) == (0, False)
    # What is refused is not asked about.
    status, shown = on_terminal("rm", url, "m@2")
    said = " ".join(plain(shown))
    assert (status, "Remove" in said, "'prod' points at m@2" in said) == (2, False, True)
    # A version whose alias is lost is kept.
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db")) as connection, connection:
        connection.execute("DELETE FROM pydedup_aliases")
    status, shown = on_terminal("rm", url, "m", "--keep", "1", answer="y\n")
    assert (status, "Remove m@3 (24 B) from" in shown, "removed m@3" in shown) == (0, True, True)


@pytest.mark.parametrize(
    "damage", ["models SET policy = CAST(x'ff' AS TEXT)", "tensors SET shape = '[9]'"]
)
def test_rm_asks_about_a_damaged_model(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with pydedup.open(path) as store:
        store.add("m@1", {"w": np.ones(3)})
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(f"UPDATE pydedup_{damage}").rowcount == 1
    status, shown = on_terminal("rm", str(path), "m@1", answer="n\n")
    assert status == 1
    said = " ".join(plain(shown))
    assert re.search("(is damaged|are missing).*Remove m@1 from sqlite:.*nothing was removed", said)
    status, shown = on_terminal("rm", str(path), "m@1", answer="y\n")
    assert status == 0
    assert "removed m@1" in shown


def slow(
    seconds: float, stages: list[tuple[str, int, int]], delay: float = 0.7, line: float = 5
) -> str:
    return (
        "import sys, time, rich.progress; from pydedup.cli import progress\n"
        "from pydedup.cli.progress import Watch\n"
        f"progress._DELAY_SECONDS, progress._LINE_SECONDS = {delay}, {line}\n"
        f"with Watch('opening') as watch:\n"
        f"    for stage in {stages!r}:\n"
        f"        watch(*stage); time.sleep({seconds / len(stages)})\n"
        "print('result')"
    )


def test_a_number_and_its_unit_are_on_one_line() -> None:
    """A percentage began one line, and its sign the next."""
    said = "12 models: 783.7 MiB of weights in a database of 197.1 MiB, 74.9 % saved, in 1 min 3 s"
    for room in range(12, 100):
        folded = output._fold(said, room)
        assert " ".join(folded) == said
        assert not [line for line in folded[1:] if re.match(r"(%|MiB|min|s)\b|%", line)], folded


def test_progress_is_a_bar_that_goes_away() -> None:
    code = slow(2.4, [("matching", 1 << 20, 4 << 20), ("writing", 1, 2)], delay=0)
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdout=subprocess.PIPE,
        stderr=slave,
        env=environment(),
    ) as process:
        os.close(slave)
        shown = read_all(master)
        assert process.stdout is not None
        assert process.stdout.read() == b"result\n"
    assert process.returncode == 0
    assert "Traceback" not in shown
    assert "1.0 MiB of 4.0 MiB" in shown
    assert shown.index("matching") < shown.index("writing")
    # The last thing it does is to clear its line and go back to its beginning.
    assert shown.endswith("\x1b[1A\x1b[2K")


def test_progress_counts_what_has_no_total() -> None:
    """Such as rows that a query finds: scoring a million said for a minute that it was scoring."""
    code = slow(1.5, [("scoring", 0, 0), ("scoring", 131_072, 0)], delay=0, line=0.1)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    first, *_, last = done.stderr.splitlines()
    assert re.fullmatch(r"pydedup: scoring, [\d.]+ m?s", first)
    assert re.fullmatch(r"pydedup: scoring 131,072 so far, [\d.]+ s", last)


def test_progress_says_nothing_when_it_is_quick_or_unwanted() -> None:
    for code in (
        slow(0.1, [("matching", 1, 2)], delay=60),
        slow(0.3, [("a", 1, 2)], delay=0, line=0.01).replace("g')", "g', quiet=True)"),
    ):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
        )
        assert (done.stdout, done.stderr) == ("result\n", "")


# ---- the pieces ---------------------------------------------------------------------------------


def test_sizes_shares_times() -> None:
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1048575: "1.0 MiB", -2048: "-2.0 KiB"}
    assert {number: text.size(number) for number in sizes} == sizes
    assert text.size(3 << 30) == "3.0 GiB"
    assert text.size(5 << 60) == "5,120.0 PiB"
    shares = {
        0: "0.0 %",
        1: "100.0 %",
        0.9999: "99.9 %",
        0.0001: "<0.1 %",
        -0.5: "-50.0 %",
        0.624: "62.4 %",
    }
    assert {share: text.percent(share) for share in shares} == shares
    assert (text.duration(0.421), text.duration(59), text.duration(200)) == (
        "0.42 s",
        "59.0 s",
        "3 min 20 s",
    )
    assert text.moment(time.time())[:2] == "20"


@pytest.mark.parametrize(
    ("room", "wanted"), [(44, LONG), (21, "encoder.la…ery.weight"), (3, "e…t"), (1, "…")]
)
def test_shorten_keeps_both_ends(room: int, wanted: str) -> None:
    assert tables.shorten(LONG, room) == wanted
    assert len(tables.shorten("模" * 30, 9)) == 5  # wide letters take two cells each


def test_secrets() -> None:
    hidden = text.without_secrets(
        "at mysql://a:b@c@h/d?password=x&y=1 and sqlite:////home/u@h/m.db"
    )
    assert hidden == "at mysql://***@h/d?password=***&y=1 and sqlite:////home/u@h/m.db"
    # As `Path` writes a URL; a model may be called so.
    hidden = text.without_secrets("mysql:/a:b@c@h/d cannot be written; team:/m@1, c:/d")
    assert hidden == "mysql:/***@h/d cannot be written; team:/m@1, c:/d"
    # Of a list of databases each keeps its host; it was cut to the last one.
    shards = "postgresql+shards://me:a@b@c:5432/d?password=x&replicas=2|s1/e|postgresql://u:p@s2/f"
    hidden = "postgresql+shards://***@c:5432/d?password=***&replicas=2|s1/e|postgresql://***@s2/f"
    assert text.without_secrets(f"{shards}: gone; {shards}.") == f"{hidden}: gone; {hidden}."
    cut = text.without_secrets("postgresql+shards://c/d|b:sec|ret@s1/d: gone, at x://u:q@h")
    assert cut == "postgresql+shards://***@s1/d: gone, at x://***@h"
    assert "12" not in text.without_secrets("postgresql+shards://c/d|b:12|34@s1/d|s2/d")
    # Advice of ours shows what a URL looks like; it told people to write stars.
    for scheme, form in (
        ("postgresql://", "user:password@host:port/database"),
        ("mysql://", "user@host/database"),
    ):
        advice = f"write {scheme}{form}, with %40 for @"
        assert text.without_secrets(advice) == advice
        hidden = f"at {scheme}***@{form.partition('@')[2]}1"
        assert text.without_secrets(f"at {scheme}{form}1") == hidden
        assert text.without_secrets(f"at {scheme}{form}@db/x") == f"at {scheme}***@db/x"
    assert text.clean("a\x1b[0m\u202eb\n") == "a\\x1b[0m\\u202eb\\n"
    assert text.clean("é模🙂 ok") == "é模🙂 ok"
    # Beside "net", which looked the same; joiners belong to what is seen.
    assert text.clean("\ufeffn\u200be\u00adt\U000e0041") == "\\ufeffn\\u200be\\xadt\\U000e0041"
    for joined in ("\U0001f469\u200d\U0001f467", "\u0645\u06cc\u200c\u062e"):
        assert text.clean(joined) == joined


def test_shells_complete_commands_and_options() -> None:
    """The script of click printed the help, and no shell completed names of files any more."""
    for words, place, found in (
        ("pydedup sc", "1", ["plain,score"]),
        ("pydedup score --on", "2", ["plain,--on-error", "plain,--on"]),
        ("pydedup nothing --on", "2", []),
        ("pydedup ls mod", "2", ["file,mod"]),
        ("pydedup ls models.db sen", "3", []),
        ("pydedup add models.db m@1 we", "4", ["file,we"]),
        ("pydedup restore mod", "2", ["file,mod"]),
        ("pydedup copy models.db oth", "3", ["file,oth"]),
        ("pydedup export models.db m ba", "4", ["file,ba"]),
        ("pydedup verify models.db --repair-from ba", "4", ["file,ba"]),
    ):
        asked = {"COMP_WORDS": words, "COMP_CWORD": place, "_PYDEDUP_COMPLETE": "bash_complete"}
        done = subprocess.run(
            PROGRAM, env=environment(**asked), capture_output=True, text=True, check=False
        )
        assert done.stderr == ""
        assert done.stdout.split() == found
