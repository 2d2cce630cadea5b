# SPDX-License-Identifier: Apache-2.0
"""word2vec text and binary, and GloVe text.

The reference readers below are the few lines that the formats' documentation gives, on whole files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pydedup.errors import FormatError, UnsupportedFormatError
from pydedup.formats import _wordparse
from pydedup.formats.base import Artifact
from pydedup.formats.registry import open_source, write_model
from pydedup.formats.wordvec import VOCABULARY

RNG = np.random.default_rng(0)
WORDS = ["the", ",", "naïve", "日本", "2", "http://a.b", "_", "0.5"]
VECTORS = RNG.standard_normal((len(WORDS), 7)).astype(np.float32)


def as_glove(words: list[bytes], vectors: Any) -> bytes:
    rows = zip(words, vectors, strict=True)
    return b"".join(word + b"".join(b" %.9g" % x for x in row) + b"\n" for word, row in rows)


def as_text(words: list[bytes], vectors: Any) -> bytes:
    return b"%d %d\n" % vectors.shape + as_glove(words, vectors)


def as_binary(words: list[bytes], vectors: Any, end: bytes = b"\n") -> bytes:
    rows = zip(words, vectors, strict=True)
    head = b"%d %d\n" % vectors.shape
    return head + b"".join(word + b" " + row.tobytes() + end for word, row in rows)


def encoded(words: list[str]) -> list[bytes]:
    return [word.encode() for word in words]


FILES = {
    "glove": as_glove,
    "word2vec": as_text,
    "word2vec-binary": as_binary,
    "word2vec-binary-without-newlines": lambda w, v: as_binary(w, v, b""),
}
SUFFIX = {"glove": ".txt", "word2vec": ".vec", "word2vec-binary": ".bin"}


def read(path: Path) -> tuple[str, Any, list[bytes]]:
    with open_source(path) as source:
        (entry,) = source.entries
        assert entry.name == "embedding"
        (artifact,) = source.artifacts()
        assert artifact.name == VOCABULARY
        array = source.read("embedding")
        assert array.shape == entry.shape
        assert not array.flags.writeable
        return source.format, array, artifact.payload.split(b"\n")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("suffix", [".txt", ".vec", ".bin", "", ".unheard-of"])
def test_reads_each_format_whatever_its_name(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"vectors{suffix}"
    path.write_bytes(FILES[kind](encoded(WORDS), VECTORS))
    found, array, words = read(path)
    assert found == kind.removesuffix("-without-newlines")
    assert array.tobytes() == VECTORS.tobytes()
    assert words == encoded(WORDS)


@pytest.mark.parametrize("kind", FILES)
def test_pieces_do_not_show(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(FILES[kind](encoded(WORDS), VECTORS))
    for piece in (16, 17, 64, 100):
        monkeypatch.setattr(_wordparse, "_PIECE", piece)
        _, array, words = read(path)
        assert array.tobytes() == VECTORS.tobytes()
        assert words == encoded(WORDS)


def test_a_line_without_end_is_refused_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_wordparse, "_PIECE", 16)
    (tmp_path / "v.txt").write_bytes(GOOD + b"x" * 1000)
    with pytest.raises(FormatError, match="line of over"):
        open_source(tmp_path / "v.txt")


@pytest.mark.parametrize("target", SUFFIX)
@pytest.mark.parametrize("kind", SUFFIX)
def test_each_exports_to_each(kind: str, target: str, tmp_path: Path) -> None:
    path, out = tmp_path / "vectors.txt", tmp_path / f"out{SUFFIX[target]}"
    path.write_bytes(FILES[kind](encoded(WORDS), VECTORS))
    with open_source(path) as source:
        tensors = {"embedding": source.read("embedding")}
        write_model(out, tensors, source.entries, source.artifacts())
    found, array, words = read(out)
    assert found == target
    assert array.tobytes() == VECTORS.tobytes()
    assert words == encoded(WORDS)
    if target == "word2vec-binary":
        assert out.read_bytes() == as_binary(encoded(WORDS), VECTORS)


def test_published_text_comes_back_as_it_was(tmp_path: Path) -> None:
    """Numbers are written with as few digits as they need."""
    text = "the 0.418 0.24968 -0.41242\nof 0.70853 0.57088 -0.4716\nand 3 -0.00015021 1e-07\n"
    (tmp_path / "glove.txt").write_text(text)
    with open_source(tmp_path / "glove.txt") as source:
        tensors = {"embedding": source.read("embedding")}
        write_model(tmp_path / "out.txt", tensors, source.entries, source.artifacts())
    assert (tmp_path / "out.txt").read_text() == text


@given(rows=st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=6))
def test_any_float_survives_text(
    rows: list[list[float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    vectors = np.array(rows, np.float32)
    path = tmp_path_factory.mktemp("text") / "v.txt"
    tensors = {"e": vectors}
    vocabulary = b"\n".join(b"w%d" % index for index in range(len(rows)))
    with open_source(tensors) as source:
        entries = source.entries
    write_model(path, tensors, entries, [Artifact(VOCABULARY, "text/plain", vocabulary)])
    _, array, _ = read(path)
    # The bits of a NaN beyond its being one have no text.
    np.testing.assert_array_equal(array, vectors)
    assert np.signbit(array[~np.isnan(vectors)]).tolist() == (
        np.signbit(vectors[~np.isnan(vectors)]).tolist()
    )


def test_unusual_but_right_lines(tmp_path: Path) -> None:
    lines = [
        b"the 0.5 1 -2",
        b". . . 1 2 3",  # words with spaces, as in GloVe's largest vocabulary
        b"at name@domain.com 1 2 3",
        b"tab\t1\t2\t3",
        b"carriage 1 2 3\r",
        b"trailing 1 2 3 ",  # the original word2vec ends lines so
        b"\xc2\xa0 1 2 3",  # a no-break space is a word
        b"broken\xff 1 2 3",
        b"special nan inf -1e-3",
    ]
    path = tmp_path / "v.txt"
    path.write_bytes(b"\n".join(lines))  # and no newline at the end
    _, array, words = read(path)
    assert words[1:3] == [b". . .", b"at name@domain.com"]
    assert words[6:8] == [b"\xc2\xa0", b"broken\xff"]
    assert array[:8, 2].tolist() == [-2, *[3] * 7]
    assert np.isnan(array[8, 0])
    path.write_bytes(b"9 3\n" + b"\n".join(lines))
    assert read(path)[1].tobytes() == array.tobytes()


def test_a_large_table_is_a_view_of_the_temporary_file(tmp_path: Path) -> None:
    vectors = RNG.standard_normal((2000, 50)).astype(np.float32)
    path = tmp_path / "v.bin"
    path.write_bytes(as_binary([b"w%d" % index for index in range(2000)], vectors))
    with open_source(path) as source:
        array = source.read("embedding")
    assert array.tobytes() == vectors.tobytes()  # also after closing


# ---- bad input ---------------------------------------------------------------------------------

GOOD = b"a 1 2 3\nb 1 2 3\n"

BAD_TEXT = {
    "too-few": (GOOD + b"c 1 2\n", "line 3: a word and 3 numbers are needed, 3 fields"),
    "too-many": (GOOD + b"c 1 2 3 4\n", "line 3: 3 numbers are needed, 4 fields follow"),
    "no-number": (GOOD + b"c 1 x 3\nd 1 2 3\n", "line 3: b'x' is no number"),
    "underscore": (GOOD + b"c 1 1_0 3\n", "line 3: b'1_0' is no number"),
    "hexadecimal": (GOOD + b"c 1 0x10 3\n", "line 3: b'0x10' is no number"),
    "two-spaces": (GOOD + b"c 1  3\n", "line 3: b'' is no number"),
    "no-word": (GOOD + b" 1 2 3\n", "line 3: a word and 3 numbers"),
    "blank-line": (GOOD + b"\nc 1 2 3\n", "line 3: a word and 3 numbers"),
    "only-a-word": (GOOD + b"c\n", "line 3"),
    "binary-rubbish": (GOOD + bytes(range(256)), "line 3"),
    "one-too-many-and-one-too-few": (GOOD + b"c 1 2\nd 1 2 3 4\n", "line 3"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
@pytest.mark.parametrize("header", [True, False])
def test_bad_lines_are_named(name: str, header: bool, tmp_path: Path) -> None:
    raw, says = BAD_TEXT[name]
    path = tmp_path / "v.txt"
    if header:
        # Where bytes are missing, the header has told so before any line is read.
        says = says.replace("line 3", "line 4") + "|truncated"
    path.write_bytes(b"3 3\n" + raw if header else raw)
    with pytest.raises(FormatError, match=says) as caught:
        open_source(path)
    assert "v.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"3 3\nalong 1 2 3\nbalance 1 2 3\n", "should hold 3 words but has 2"),
        (b"3 3\n" + GOOD, "truncated"),
        (b"1 3\n" + GOOD, "should hold 1 words but has 2"),
        (b"999999999999 3\n" + GOOD, "should hold 999999999999 words"),
        (b"2 99999999999999999999\n" + GOOD, "should hold 2 words"),
        (b"2 0\n" + GOOD, "does not begin like"),
    ],
)
def test_headers_that_lie(raw: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "v.vec").write_bytes(raw)
    with pytest.raises(FormatError, match=says):
        open_source(tmp_path / "v.vec")


def test_every_truncation_of_binary_is_noticed(tmp_path: Path) -> None:
    raw = as_binary(encoded(WORDS), VECTORS, b"")
    path = tmp_path / "v.bin"
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            open_source(path)


def test_truncated_text_is_noticed_where_the_format_can(tmp_path: Path) -> None:
    """GloVe has no count: a cut between lines, or inside the last number, cannot be seen."""
    raw = as_text(encoded(WORDS), VECTORS)
    path = tmp_path / "v.vec"
    last_number = raw.rindex(b" ") + 1
    for length in range(last_number):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            open_source(path)


@pytest.mark.parametrize("extra", [b"more", b"\nmore 1", bytes(40)])
def test_bytes_after_the_last_vector_are_refused(extra: bytes, tmp_path: Path) -> None:
    (tmp_path / "v.bin").write_bytes(as_binary(encoded(WORDS), VECTORS, b"") + extra)
    with pytest.raises(FormatError, match="goes on after"):
        open_source(tmp_path / "v.bin")


def test_a_word_without_end_is_refused_soon(tmp_path: Path) -> None:
    (tmp_path / "v.bin").write_bytes(b"50000 3\nx " + bytes(12) + b"y" * 2_000_000)
    with pytest.raises(FormatError, match="word 2 of 50000 has no end"):
        open_source(tmp_path / "v.bin")


@pytest.mark.parametrize(
    ("tensors", "words", "says"),
    [
        ({"e": VECTORS, "f": VECTORS}, WORDS, "the model has 2 tensors"),
        ({"e": VECTORS[0]}, WORDS, "one table of word vectors"),
        ({"e": VECTORS}, WORDS[:-1], "the model has 7"),
        ({"e": VECTORS}, [], "the model has 0"),
        ({"e": VECTORS.astype(np.float64)}, WORDS, "cannot hold f64"),
        ({"e": VECTORS.astype(np.int32)}, WORDS, "cannot hold int32"),
    ],
)
@pytest.mark.parametrize("kind", SUFFIX)
def test_what_the_formats_cannot_hold(
    tensors: dict[str, Any], words: list[str], says: str, kind: str, tmp_path: Path
) -> None:
    vocabulary = [Artifact(VOCABULARY, "text/plain", "\n".join(words).encode())] if words else []
    with open_source(tensors) as source, pytest.raises(UnsupportedFormatError, match=says):
        write_model(tmp_path / "out", tensors, source.entries, vocabulary, format=kind)
    assert list(tmp_path.iterdir()) == []


def test_words_that_a_target_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_bytes(GOOD + b". . . 1 2 3\n")
    with open_source(tmp_path / "v.txt") as source:
        tensors = {"embedding": source.read("embedding")}
        with pytest.raises(UnsupportedFormatError, match="with a space in it"):
            write_model(tmp_path / "out.bin", tensors, source.entries, source.artifacts())
    assert not (tmp_path / "out.bin").exists()
