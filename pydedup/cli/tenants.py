# SPDX-License-Identifier: Apache-2.0
"""``pydedup quota``, and the table of ``pydedup stats --by``: bytes by a key of metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from pydedup import Store, text
from pydedup.cli import options, output
from pydedup.cli.progress import WAITING, Watch
from pydedup.cli.tables import Column, print_table
from pydedup.quotas import MEASURES, Quota, quota_of
from pydedup.words import Measure

if TYPE_CHECKING:
    from pydedup.usage import Usage, ValueUsage

__all__ = ["print_usage", "quota"]

_NO_VALUE = "(none)"


@click.command(short_help="Limit what models with a value of metadata may take.")
@options.store_argument
@click.argument("subject", metavar="[KEY=VALUE]", required=False)
@click.argument("limit", metavar="[SIZE]", required=False)
@click.option(
    "--measure",
    type=click.Choice(MEASURES),
    default=MEASURES[0],
    show_default=True,
    help="What is limited. marginal: stored blocks that no model of another value uses, which is "
    "what removing the models would free. logical: the size of their tensors.",
)
@click.option("--delete", is_flag=True, help="Delete the quota instead.")
@options.json_option
def quota(
    url: str, subject: str | None, limit: str | None, measure: Measure, delete: bool, as_json: bool
) -> None:
    """Limit what the models with a value of metadata, such as tenant=acme, may take together.

    An add that would take them over SIZE (such as 1.5GB; 0 for nothing) is refused. KEY alone
    limits each of its values that has no quota of its own. Without SIZE, list the quotas and what
    is used of them; for KEY alone, that is what the value with the largest use takes.
    """
    if delete and (subject is None or limit is not None):
        raise click.UsageError("--delete takes the KEY=VALUE of the quota, without a SIZE")
    if delete or limit is not None:
        assert subject is not None
        _change(url, *_parsed(subject), limit, measure, as_json)
        return
    with options.read_store(url) as store:
        quotas = list(store.quotas)
        asked = _asked(quotas, subject)
        used = {key: store.stats(by=key) for key in {found.key for found, _ in asked}}
        shown = store.url
    damaged = list(dict.fromkeys(said for usage in used.values() for said in usage.damaged))
    rows = [(found, _used(found, value, used[found.key], quotas)) for found, value in asked]
    if as_json:
        quotas_shown = [_document(*row) for row in rows]
        output.emit_json({"url": shown, "quotas": quotas_shown, "damaged": damaged})
    elif rows:
        print_table(_QUOTA_COLUMNS, [_row(*row) for row in rows])
    else:
        of = "" if subject is None else f" for {subject}"
        output.print_note(f"no quota{of}; `pydedup quota STORE KEY=VALUE SIZE` sets one", "dim")
    output.refuse_damaged(shown, damaged)


_QUOTA_COLUMNS = (
    Column("For", number=False, name=True, style="cyan"),
    Column("Quota"),
    Column("Measure", number=False, rank=1),
    Column("Used"),
    Column("Left"),
)


def _change(
    url: str, key: str, value: str | None, limit: str | None, measure: Measure, as_json: bool
) -> None:
    with options.existing_store(url) as store, Watch(WAITING):
        if limit is None:
            changed = store.quotas.remove(key, value)
        else:
            changed = store.quotas.set(key, value, limit, measure=measure)
        used = _NOTHING
        if limit is not None:
            used = _used(changed, value, store.stats(by=key), list(store.quotas))
    if as_json:
        output.emit_json({"deleted": limit is None, **_document(changed, used)})
    elif limit is None:
        output.print_note(f"{changed} has no quota any more (it was {text.size(changed.bytes)})")
    else:
        who = f"each {key} without a quota of its own" if value is None else str(changed)
        output.print_note(
            f"{who} may take {text.size(changed.bytes)} ({text.plural(changed.bytes, 'byte')}), "
            f"{changed.measure}"
        )
        if used.bytes > changed.bytes:
            who = "it" if value is not None else f"{key}={used.by}"
            output.print_note(
                f"{who} takes {text.size(used.bytes)} already: adds to it are refused until it "
                "takes less",
                "yellow",
            )


def _parsed(subject: str) -> tuple[str, str | None]:
    key, equals, value = subject.partition("=")
    if not key:
        raise click.UsageError(f"{subject!r} is not KEY=VALUE, such as tenant=acme")
    return key, value if equals else None


def _asked(quotas: Sequence[Quota], subject: str | None) -> list[tuple[Quota, str | None]]:
    """Return the quotas to list, each with the value whose use of it is shown."""
    if subject is None:
        return [(quota, quota.value) for quota in quotas]
    key, value = _parsed(subject)
    if value is None:
        return [(quota, quota.value) for quota in quotas if quota.key == key]
    found = quota_of(quotas, key, value)  # its own, or that of each value without one
    return [] if found is None else [(found, value)]


@dataclasses.dataclass(frozen=True, slots=True)
class _Used:
    """What is used of a quota, and by which value; by the one that uses most, where many may."""

    bytes: int
    by: str | None


_NOTHING = _Used(0, None)


def _used(quota: Quota, value: str | None, usage: Usage, quotas: Sequence[Quota]) -> _Used:
    """Return what a value uses of its quota, or the most that one does of that of many."""
    if value is not None:
        mine = [found for found in usage.values if found.value == value]
        return _Used(sum(_measured(found, quota) for found in mine), value)
    under = [of for of in usage.values if quota_of(quotas, quota.key, of.value) == quota]
    if not under:
        return _NOTHING
    most = max(under, key=lambda found: _measured(found, quota))
    return _Used(_measured(most, quota), most.value)


def _measured(value: ValueUsage, quota: Quota) -> int:
    return value.logical_bytes if quota.measure == "logical" else value.marginal_bytes


def _row(quota: Quota, used: _Used) -> list[str]:
    if quota.value is not None:
        who, of = str(quota), ""
    else:
        who, of = f"{quota.key} (each other value)", "" if used.by is None else f" ({used.by})"
    return [
        who,
        text.size(quota.bytes),
        quota.measure,
        text.size(used.bytes) + of,
        _left(quota, used.bytes),
    ]


def _left(quota: Quota, used: int) -> str:
    return text.size(quota.bytes - used) if used <= quota.bytes else "over"


def _document(quota: Quota, used: _Used) -> dict[str, Any]:
    return {**dataclasses.asdict(quota), "used_bytes": used.bytes, "used_by": used.by}


def print_usage(store: Store, key: str, as_json: bool) -> None:
    """Print the bytes of a store by the values of a key of metadata."""
    usage, quotas = store.stats(by=key), list(store.quotas)
    held = [quota_of(quotas, key, value.value) for value in usage.values]
    if as_json:
        output.emit_json(_usage_document(store.url, usage, held))
    else:
        _print_usage(usage, held)
    output.refuse_damaged(store.url, usage.damaged)


def _print_usage(usage: Usage, held: Sequence[Quota | None]) -> None:
    key = usage.key
    if not usage.values:
        if not usage.damaged:
            output.print_note("no models yet; `pydedup add` puts them in", "dim")
        return
    if all(value.value is None for value in usage.values):
        there = "there is none at all"
        if usage.keys:
            there = f"there are: {', '.join(map(text.clean, usage.keys))}"
        none = "no model that can be read" if usage.damaged else "no model"
        output.print_note(
            f"{none} has the key {text.clean(key)!r} in its metadata; {there}", "yellow"
        )
        return
    columns = [
        Column(text.clean(key), number=False, name=True, style="cyan"),
        Column("Models", rank=2),
        Column("Weights"),
        Column("Shared", rank=1),
        Column("Marginal"),
    ]
    rows = [
        [
            _NO_VALUE if value.value is None else value.value,
            text.count(value.models),
            text.size(value.logical_bytes),
            text.size(value.shared_bytes),
            text.size(value.marginal_bytes),
        ]
        for value in usage.values
    ]
    if any(held):
        columns += [Column("Quota", rank=1), Column("Left")]
        for row, value, quota in zip(rows, usage.values, held, strict=True):
            row += ["-", "-"] if quota is None else _held(quota, value)
    print_table(columns, rows)
    output.print_note(
        f"blocks that several share take {text.size(usage.shared_bytes)}, counted once; all blocks "
        f"in use take {text.size(usage.used_bytes)}",
        "dim",
    )


def _held(quota: Quota, value: ValueUsage) -> list[str]:
    measure = "" if quota.measure == "marginal" else f" {quota.measure}"
    return [text.size(quota.bytes) + measure, _left(quota, _measured(value, quota))]


def _usage_document(url: str, usage: Usage, held: Sequence[Quota | None]) -> dict[str, Any]:
    return {
        "url": url,
        "key": usage.key,
        "keys": list(usage.keys),
        "values": [
            {
                **dataclasses.asdict(value),
                "quota": None if quota is None else dataclasses.asdict(quota),
            }
            for value, quota in zip(usage.values, held, strict=True)
        ],
        "shared_bytes": usage.shared_bytes,
        "used_bytes": usage.used_bytes,
        "damaged": list(usage.damaged),
    }
