# SPDX-License-Identifier: Apache-2.0
"""Tensors by name, which others may have under another prefix."""

from __future__ import annotations

import pytest

from pydedup.ingest.names import ByName, prefixes


def by_name(*names: str) -> ByName[str]:
    found: ByName[str] = ByName()
    for name in names:
        found[name] = name
    return found


@pytest.mark.parametrize(
    ("names", "name", "found"),
    [
        (["a.w", "b.a.w"], "a.w", "a.w"),
        (["m.a.w", "m.b.w"], "b.w", "m.b.w"),
        (["a.w", "b.w"], "m.b.w", "b.w"),
        (["x.y.a.w", "x.y.b.w"], "m.b.w", "x.y.b.w"),
        (["m.a.w", "n.a.w"], "a.w", None),  # which one?
        (["m.a.w"], "b", None),
    ],
)
def test_a_name_is_found_under_another_prefix(
    names: list[str], name: str, found: str | None
) -> None:
    assert by_name(*names).get(name) == found


def test_a_prefix_has_eight_parts_at_most() -> None:
    """Of a name of 500 parts all ends were kept: 2,000 such took each add 600 MB."""
    for parts, found in ((8, True), (9, False)):
        name = "p." * parts + "a.w"
        assert (by_name(name).get("a.w") == name) is found
        assert (by_name("a.w").get(name) == "a.w") is found


@pytest.mark.parametrize(
    ("name", "other", "found"),
    [
        ("a.w", "a.w", ("", "")),
        ("bert.a.w", "a.w", ("bert", "")),
        ("x.bert.a.w", "model.a.w", ("x.bert", "model")),
        ("head.w", "model.embed.w", ("head", "model.embed")),
        ("head", "embed", ("head", "embed")),
    ],
)
def test_prefixes_are_what_differs(name: str, other: str, found: tuple[str, str]) -> None:
    assert prefixes(name, other) == found
