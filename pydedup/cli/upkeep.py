# SPDX-License-Identifier: Apache-2.0
"""``pydedup verify``, ``refill`` and ``vacuum``: keeping a store sound and small."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

import pydedup
from pydedup import text
from pydedup.cli import completing, options, output
from pydedup.cli.errors import Exit, warn
from pydedup.cli.progress import Watch
from pydedup.cli.tables import Column, print_table

if TYPE_CHECKING:
    from pydedup.maintenance.damage import VerifyReport
    from pydedup.maintenance.refill import RefillReport
    from pydedup.maintenance.repair import MissingBlocks, RepairReport
    from pydedup.maintenance.vacuum import VacuumReport

__all__ = ["refill", "vacuum", "verify"]

_SHOWN_NOTES = 10
_READS_COLUMNS = (
    Column("Model", number=False, name=True, style="cyan"),
    Column("Pages read"),
    Column("Then"),
    Column("Least", rank=1),
)


@click.command(short_help="Check every page, block and block map; repair damaged pages.")
@options.store_argument
@click.option(
    "--evaluate",
    "metrics",
    metavar="NAME MODULE:FUNCTION",
    nargs=2,
    multiple=True,
    shell_complete=completing.complete_models,
    help="Also evaluate a model that was added with the policy accuracy, and compare the metric "
    "with its certificate; may be repeated.",
)
@click.option(
    "--repair-from",
    "source",
    metavar="URL|FILE",
    shell_complete=completing.complete_stores,
    help="Restore blocks of damaged pages, by their hash, from another store, a backup, or a "
    "model's file or folder.",
)
@options.json_option
@options.quiet_option
def verify(
    url: str, metrics: Sequence[tuple[str, str]], source: str | None, as_json: bool, quiet: bool
) -> int:
    """Check every page, block and block map against what was recorded.

    Nothing is changed without --repair-from. With it, damaged pages are replaced by new ones, made
    of blocks that are still as recorded and of those that the other store or file has; other
    models are served meanwhile. Blocks found in neither are listed with the models that miss them;
    try again with another source. All else that is printed is the state after the repair.

    The exit status is 1 when something is damaged, or could not be checked because its server does
    not answer, or a metric is below what was promised.
    """
    evaluate = {name: options.load_function(place) for name, place in metrics}
    opened = options.read_store if source is None else options.existing_store
    with (
        opened(url) as store,
        options.prints_apart(),
        Watch("opening", quiet=quiet) as watch,
    ):
        report = store.verify(evaluate=evaluate, repair_from=source, progress=watch)
    if as_json:
        output.emit_json({"ok": report.ok, **dataclasses.asdict(report)})
        return Exit.OK if report.ok else Exit.DIFFERENT
    _print_verify(report, source or "", watch.seconds)
    return Exit.OK if report.ok else Exit.DIFFERENT


def _print_verify(report: VerifyReport, source: str, seconds: float) -> None:
    """Say what is wrong, and how much was looked at."""
    if report.repair is not None:
        _print_repair(report.repair, source)
    for complaint in report.errors:
        output.print_note(f"damaged: {complaint}", "red")
    for complaint in report.unreachable:
        output.print_note(f"unreachable: {complaint}", "yellow")
    for complaint in report.broken_promises:
        output.print_note(f"promise broken: {complaint}", "red")
    for note in report.notes[:_SHOWN_NOTES]:
        output.print_note(f"note: {note}", "dim")
    if len(report.notes) > _SHOWN_NOTES:
        output.print_note(f"and {len(report.notes) - _SHOWN_NOTES} more notes (see --json)", "dim")
    checked = ", ".join(
        [
            text.models(report.names, report.models),
            f"{text.plural(report.pages, 'page')} ({text.size(report.page_bytes)})",
            text.plural(report.blocks, "block"),
        ]
    )
    if report.errors and not source:
        # What a repair has no use for, such as a lost alias, is not to be tried with one.
        rows = report.unrecorded_blocks or report.surplus_blocks or report.wrong_readers
        repaired = (
            "pages are restored by `pydedup verify --repair-from` another store, a backup or a "
            "model's file; docs/faults.md says what to do about all else"
        )
        told = repaired if report.damaged_pages or rows else "docs/faults.md says what to do"
        output.print_note(told, "dim")
    verdict, style = "sound", "green"
    if not report.ok:
        verdict, style = "NOT ALL CHECKED", "bold yellow"
    if report.broken_promises:
        verdict, style = "PROMISE BROKEN", "bold red"
    if report.errors:
        models = {name for names in report.damaged_pages.values() for name in names}
        verdict, style = "DAMAGED", "bold red"
        if report.damaged_pages:
            pages = text.plural(len(report.damaged_pages), "page")
            verdict += f" ({pages} of {text.plural(len(models), 'model')})"
    output.print_note(f"{verdict}: {checked}, checked in {text.duration(seconds)}", style)


def _print_repair(repair: RepairReport, source: str) -> None:
    """Say what was restored, and what could not be."""
    if repair.recorded_models or repair.recorded_blocks:
        output.print_note(
            f"recorded anew: what {text.plural(repair.recorded_models, 'model')} "
            f"{'reads' if repair.recorded_models == 1 else 'read'}, and where "
            f"{text.plural(repair.recorded_blocks, 'block')} "
            f"{'is' if repair.recorded_blocks == 1 else 'are'}",
            "green",
        )
    if not repair.damaged_pages:
        if not repair.recorded_models and not repair.recorded_blocks:
            output.print_note("nothing to repair")
        return
    output.print_note(
        f"repaired {text.count(repair.replaced_pages)} of "
        f"{text.plural(repair.damaged_pages, 'damaged page')}: "
        f"{text.plural(repair.found_blocks, 'block')} from {text.without_secrets(source)}, "
        f"{text.count(repair.kept_blocks)} still as recorded on the damaged pages",
        "green",
    )
    for missing in repair.missing:
        output.print_note(
            f"not found: {text.plural(missing.blocks, 'block')} of page {missing.page}, missed by "
            f"{text.listed(missing.models)}: {_why(missing)}",
            "red",
        )
    for where, said in list(repair.source_damage.items())[:_SHOWN_NOTES]:
        output.print_note(f"the source is damaged itself: {where}: {said}", "yellow")
    if len(repair.source_damage) > _SHOWN_NOTES:
        output.print_note(f"and {len(repair.source_damage) - _SHOWN_NOTES} more there", "yellow")
    for page_id in repair.undeleted_pages:
        output.print_note(
            f"note: page {page_id} is not used any more, but the database cannot delete it, being "
            "damaged itself; see docs/faults.md",
            "yellow",
        )
    if any(missing.damaged_there for missing in repair.missing):
        output.print_note("repair the source first, from elsewhere, or take another", "dim")
    elif repair.missing:
        output.print_note("another store or file may have them: run it again with that", "dim")


def _why(missing: MissingBlocks) -> str:
    """Say why blocks were not found."""
    lacking = missing.blocks - missing.damaged_there - missing.forgotten
    reasons = []
    if missing.damaged_there:
        pages = text.listed([str(page_id) for page_id in missing.source_pages])
        reasons.append(
            f"the source has {text.count(missing.damaged_there)}, but on damaged pages "
            f"of its own ({pages})"
        )
    if lacking:
        reasons.append(f"the source lacks {text.count(lacking)}")
    if missing.forgotten:
        reasons.append(f"of {text.count(missing.forgotten)} nothing is recorded to find them by")
    return "; ".join(reasons)


@click.command(short_help="Put back copies of pages that are missing or damaged.")
@options.store_argument
@click.option(
    "--replace",
    is_flag=True,
    help="First put the one new, empty database in STORE in the place of a shard that is lost for "
    "good.",
)
@options.json_option
@options.quiet_option
def refill(url: str, replace: bool, as_json: bool, quiet: bool) -> int:
    """Put back copies of pages that are missing or damaged, where STORE keeps several.

    Each comes from another copy that is whole, by its checksum. Serving, adding and vacuuming go on
    meanwhile; if it is cut off, running it again does what is left.

    A shard that is lost for good is replaced with --replace: in STORE, write a new, empty database
    in its place. The lost one is refused from then on, should it come back. When no database in
    STORE is empty, nothing is replaced.

    The exit status is 1 when a page has no whole copy left, or a database did not answer or does
    not accept changes.
    """
    replaced = pydedup.Store.replace_lost(url) if replace else None
    try:
        with options.existing_store(url) as store, Watch("opening", quiet=quiet) as watch:
            report = store.refill(progress=watch)
    except BaseException:
        if replaced is not None:
            warn(
                f"{replaced[1]} took the place of {replaced[0]}, which is done and stays so; its "
                "copies are not all back: run `pydedup refill` again, --replace is not needed"
            )
        raise
    if as_json:
        places = dict(zip(("was", "now"), replaced, strict=True)) if replaced else None
        output.emit_json({"ok": report.ok, "replaced": places, **dataclasses.asdict(report)})
        return Exit.OK if report.ok else Exit.DIFFERENT
    if replaced is not None:
        output.print_note(f"{replaced[1]} took the place of {replaced[0]}")
    elif replace:
        output.print_note("nothing to replace: no database of the list is empty")
    _print_refill(report, watch.seconds)
    return Exit.OK if report.ok else Exit.DIFFERENT


def _print_refill(report: RefillReport, seconds: float) -> None:
    """Say what was put back, and what could not be."""
    if report.copies == 1:
        output.print_note(
            "nothing to refill: this store keeps one copy of each page; `pydedup verify "
            "--repair-from` restores damaged ones from elsewhere"
        )
        return
    for place, copies in report.places.items():
        output.print_note(f"{place}: {text.count(copies)} of its copies put back", "green")
    for place, why in report.failed.items():
        said = why if why.startswith(place) else f"{place}: {why}"
        output.print_note(f"not refilled: {said}", "red")
    if report.failed:
        output.print_note(
            "run it again when that is fixed; --replace puts a new, empty database in the place of "
            "a shard that is lost for good",
            "dim",
        )
    for page, models in report.lost.items():
        readers = f"read by {', '.join(models)}" if models else "no model reads it"
        output.print_note(f"page {page} has no whole copy left; {readers}", "red")
    if report.lost:
        output.print_note("`pydedup verify --repair-from` restores them from elsewhere", "dim")
    pages = f"{text.plural(report.pages, 'page')} ({text.size(report.page_bytes)})"
    done = (
        f"{text.count(report.missing)} missing and {text.count(report.damaged)} damaged copies put "
        f"back ({text.size(report.written_bytes)})"
    )
    if report.ok and not report.missing and not report.damaged:
        done = "nothing to refill"
    verdict = f"each has its {report.copies} copies" if report.ok else "NOT COMPLETE"
    output.print_note(
        f"{done}; {pages}: {verdict}, checked in {text.duration(seconds)}",
        "green" if report.ok else "bold red",
    )


@click.command(short_help="Free what nobody uses, and repack pages.")
@options.store_argument
@options.number_option(
    "--grace",
    "SECONDS",
    click.FloatRange(min=0),
    0.0,
    "Keep pages that were retired less than this long ago.",
)
@click.option("--dry-run", is_flag=True, help="Say what vacuum would save; change nothing.")
@options.memory_option
@options.json_option
@options.quiet_option
def vacuum(url: str, grace: float, dry_run: bool, memory: str, as_json: bool, quiet: bool) -> None:
    """Free what nobody uses, and repack pages where models read more of them than they must.

    Pages are rewritten only where it pays: where each new page saves at least a tenth of one,
    stored or read, or where a quarter of an old page is unused. Deltas on blocks of removed models
    are stored without these where that takes less; what models hold stays the same. Remains of
    abandoned adds are deleted as well. Reading goes on meanwhile. With --dry-run the figures say
    what vacuum would do now: exactly, except for the size of the store.
    """
    opened = (options.read_store if dry_run else options.existing_store)(url, memory)
    with opened as store, Watch("vacuum", quiet=quiet) as watch:
        report = store.vacuum(grace_seconds=grace, dry_run=dry_run, progress=watch)
    if as_json:
        output.emit_json(dataclasses.asdict(report))
    else:
        _print_vacuum(report, dry_run)


def _print_vacuum(report: VacuumReport, dry_run: bool) -> None:
    """Say what was freed, or would be."""
    before, after = (
        text.size_at_least(nbytes, report.stored_bytes_exact)
        for nbytes in (report.stored_bytes_before, report.stored_bytes_after)
    )
    if dry_run:
        after = f"about {text.size(report.stored_bytes_after)}"
    changed = [model for model in report.models if model.before != model.after]
    if dry_run and changed:
        rows = [[m.model, *map(text.count, (m.before, m.after, m.least))] for m in changed]
        print_table(_READS_COLUMNS, rows, summed=True)
    if dry_run:
        output.print_note("nothing was changed: without --dry-run, vacuum would do this", "yellow")
    if report.not_repacked is not None:
        output.print_note(
            f"not repacked, a later vacuum tries again: {report.not_repacked}", "yellow"
        )
    fields = [
        (
            "freed",
            # Less what took their place; with --grace, that comes before they go.
            f"{text.plural(max(report.freed_pages - report.repacked_pages, 0), 'page')}, "
            f"{text.size(max(report.freed_bytes - report.repacked_bytes, 0))}",
        ),
        ("repacked", _repacked(report)),
        (
            "pages in use",  # those of what was removed are in use no more
            f"{text.count(report.pages_before)} -> {text.count(report.pages_after)}, "
            f"{text.size(report.page_bytes_before)} -> {text.size(report.page_bytes_after)}",
        ),
        (
            "page reads",
            f"{text.count(sum(model.before for model in report.models))} -> "
            f"{text.count(sum(model.after for model in report.models))} (all models)",
        ),
        (
            "read amplification",
            f"{text.ratio(report.amplification_before)} -> "
            f"{text.ratio(report.amplification_after)} (pages read / least possible, worst model)",
        ),
        ("store", f"{before} -> {after}"),
    ]
    if report.reencoded_blocks:
        said = f"{text.plural(report.reencoded_blocks, 'delta')} on blocks of removed models, "
        saved = f"{text.size(report.reencoded_saves_bytes)} less"
        fields.insert(2, ("stored anew", said + saved))
    if report.abandoned_adds:
        fields.append(("abandoned adds", text.count(report.abandoned_adds)))
    if report.waiting_pages:
        fields.append(("in grace", f"{text.plural(report.waiting_pages, 'page')} wait for --grace"))
    output.print_fields(fields)


def _repacked(report: VacuumReport) -> str:
    if not report.repacked_pages:
        return "nothing"
    return (
        f"{text.count(report.rewritten_pages)} of {text.plural(report.pages_before, 'page')}, into "
        f"{text.plural(report.repacked_pages, 'new one')}"
    )
