# SPDX-License-Identifier: Apache-2.0
"""A store as one file and back: a copy to or from a store in SQLite.

The file appears under its name when it is complete. Until then it is called ``NAME.partial``; what
an earlier backup left there goes on where it ended, if all that is in it is still what the source
has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pydedup.adapter import Adapter
from pydedup.adapter_options import only_sound_rows, telling_rows
from pydedup.errors import (
    ArgumentError,
    ConflictError,
    CorruptStoreError,
    MissingStoreError,
    NotAStoreError,
    PydedupError,
    StorageFullError,
    is_full,
)
from pydedup.formats._files import sync
from pydedup.jobs import Job, job_is_dead, job_is_ours
from pydedup.maintenance.rows import lost_models
from pydedup.maintenance.vacuum import collect_abandoned
from pydedup.moving.copy import copy_models
from pydedup.moving.plan import SKIPPING, plan_copy, same_model
from pydedup.moving.source import End
from pydedup.names import check_path
from pydedup.quotas import QUOTAS_NAME, Quotas
from pydedup.text import listed
from pydedup.types import CopyReport, Progress
from pydedup.words import OpenMode

__all__ = ["backup_store", "file_url", "restore_store"]

_PARTIAL = ".partial"
#: Of a file's name, on all usual file systems.
_NAME_BYTES = 255
_BESIDE = ("-wal", "-shm", "-journal")
# In `meta` of a backup, from its beginning: of which store it is. Without it, a file is none.
_BACKUP_OF = "backup_of"
#: The unfinished files that this process writes, by device and inode. In any other, its jobs are of
#: backups that ended: an interrupt as one begins or ends can keep it from saying so.
_writing: set[tuple[int, int]] = set()
# Of `meta`: what somebody has set. All else is about one store and its history.
_SETTINGS = (QUOTAS_NAME,)

#: Opens a store by its URL; ``"r"`` only to read.
Opener = Callable[[str, OpenMode], AbstractContextManager[End]]


def file_url(path: str | os.PathLike[str]) -> str:
    """Return the URL of a SQLite file."""
    text = check_path(path, "path")
    if "?" in text:
        raise ArgumentError(f"{text!r} cannot be the name of a backup: it holds '?'")
    return f"sqlite:///{Path(text).absolute()}"


def backup_store(
    source: End,
    path: str | os.PathLike[str],
    opened: Opener,
    *,
    replace: bool,
    skip_damaged: bool,
    progress: Progress | None,
) -> CopyReport:
    """Write a whole store to a file; see `pydedup.Store.backup`."""
    url = file_url(path)
    target = Path(path).absolute()
    _check_name(target.name)
    _check_free(source.adapter, target, url, opened, replace=replace)
    partial = target.with_name(target.name + _PARTIAL)
    damaged: list[str] = []
    leaving_out = telling_rows(source.adapter, damaged) if skip_damaged else nullcontext()
    with _room_told(target), contextlib.ExitStack() as stack:
        with _turn(target.parent), leaving_out:
            mark = source.adapter.meta().get("store_id", "")
            if os.path.lexists(partial) and target.exists() and partial.samefile(target):
                partial.unlink()  # the last step of a backup that was killed there
            _drop_useless(source.adapter, partial, opened)
            end = stack.enter_context(opened(file_url(partial), "a"))
            told = stack.enter_context(_alone(end.adapter, partial, mark, progress))
        skipped = damaged if skip_damaged else None
        items = plan_copy(
            source.adapter,
            end.adapter,
            None,
            all_versions=False,
            on_conflict="error",
            damaged=skipped,
        )
        with only_sound_rows(source.adapter) if skip_damaged else nullcontext():
            settings = _settings(source.adapter, skipped)
        report = copy_models(source, end, items, damaged=skipped, progress=told)
        _carry_settings(settings, end.adapter)
        if replace:
            _check_free(source.adapter, target, url, opened, replace=True)
            if report.damaged and target.exists():
                raise CorruptStoreError(
                    f"{target} is not replaced: it may hold what is damaged in "
                    f"{source.adapter.url} ({report.damaged[0]}); give the backup another name"
                )
        with _turn(target.parent):
            stack.close()  # nobody goes on with it between here and there
            _publish(partial, target, replace=replace)
    return dataclasses.replace(report, target=url)


def restore_store(
    path: str | os.PathLike[str], target: End, opened: Opener, *, progress: Progress | None
) -> CopyReport:
    """Write what a file holds into an empty store; see `pydedup.Store.restore`."""
    with _opened_backup(path, opened) as source:
        items = plan_copy(source.adapter, None, None, all_versions=False, on_conflict="error")
        mine = {item.address: item.row for item in items}
        with target.adapter.snapshot():
            theirs = {row.address: row for row in target.adapter.models()}
            strangers = [
                address
                for address, row in theirs.items()
                if address not in mine
                or not same_model(source.adapter, mine[address], target.adapter, row)
            ]
        if strangers:
            raise ArgumentError(
                f"{target.adapter.url} has other models than {os.fspath(path)!r}: "
                f"{listed(strangers)}; a backup is restored into an empty store "
                "(copy adds its models to others)"
            )
        items = plan_copy(
            source.adapter, target.adapter, None, all_versions=False, on_conflict="error"
        )
        report = copy_models(source, target, items, progress=progress)
        _carry_settings(_settings(source.adapter), target.adapter, keep=True)
        return report


@contextlib.contextmanager
def _opened_backup(path: str | os.PathLike[str], opened: Opener) -> Iterator[End]:
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(opened(file_url(path), "r"))
        except MissingStoreError as error:
            raise NotAStoreError(f"there is no such backup: {error.what}") from error
        yield source


def _settings(source: Adapter, damaged: list[str] | None = None) -> dict[str, str]:
    """Return what was set for a whole store, as its ``meta`` has it.

    Raises CorruptStoreError where that is damaged; with ``damaged`` it is left out, and told there.
    """
    try:
        list(Quotas(source))
    except CorruptStoreError as error:
        if damaged is None:
            raise CorruptStoreError(f"{error}{SKIPPING}") from error
        damaged.append(str(error))
        return {}
    ours = source.meta()
    return {name: ours[name] for name in _SETTINGS if name in ours}


def _carry_settings(settings: Mapping[str, str], target: Adapter, *, keep: bool = False) -> None:
    """Set what was set for the whole store, after its models: quotas hold for what comes next.

    With ``keep`` what is set at the destination stays.
    """
    theirs = target.meta()
    wanted = {n: value for n, value in settings.items() if not (keep and n in theirs)}
    if any(theirs.get(name) != value for name, value in wanted.items()):
        with target.transaction():
            target.bump_epoch()
            for name, value in wanted.items():
                target.set_meta(name, value)


def _check_name(name: str) -> None:
    """Raise ArgumentError for a name that others are made of, or that none can be made of."""
    if name.endswith(_PARTIAL):
        raise ArgumentError(
            f"{name} would be the unfinished backup {name.removesuffix(_PARTIAL)!r}; give the "
            "backup another name"
        )
    for end in _BESIDE:
        if name.endswith(end):
            raise ArgumentError(
                f"{name} would be what SQLite keeps beside {name.removesuffix(end)!r}; give the "
                "backup another name"
            )
    most = _NAME_BYTES - len(_PARTIAL) - max(map(len, _BESIDE))
    if len(os.fsencode(name)) > most:
        raise ArgumentError(f"the name of a backup has at most {most} bytes; take a shorter one")


def _check_free(source: Adapter, target: Path, url: str, opened: Opener, *, replace: bool) -> None:
    """Raise ArgumentError unless the file may be written under its name.

    CorruptStoreError where it may hold what the source has lost.
    """
    if not target.parent.is_dir():
        raise ArgumentError(f"there is no folder {target.parent}; create it first")
    if not os.path.lexists(target):
        return
    if target.is_dir() and not replace:
        raise ArgumentError(f"{target} is a folder; name a file in it, such as models.backup")
    if not replace:
        raise ArgumentError(
            f"{target} exists; give the backup another name, or replace that one (replace=True, "
            "--replace)"
        )
    try:
        with opened(url, "r") as old:
            is_source = old.adapter.meta().get("store_id") == source.meta().get("store_id")
    except NotAStoreError as error:
        raise ArgumentError(f"{target} is no backup, so it is not replaced: {error}") from error
    if is_source:
        raise ArgumentError(f"{target} is the store itself, or a copy of its file; it is kept")
    lost = lost_models(source)
    if lost:
        raise CorruptStoreError(
            f"the row of the model with id {min(lost)} is damaged or lost in {source.url}, and "
            f"{target} may hold that model, so it is not replaced; run verify on the store, or "
            "give the backup another name"
        )
    for end in _BESIDE:
        if Path(f"{target}{end}").exists():
            raise ArgumentError(
                f"{target} is in use ({target.name}{end} lies beside it); close it first, or give "
                "the backup another name"
            )


@contextlib.contextmanager
def _room_told(target: Path) -> Iterator[None]:
    """Tell who fills the disk what to do with a backup, which is no store to be vacuumed."""
    try:
        yield
    except StorageFullError as exc:
        if not is_full(target.parent):
            raise  # of the folder of temporary files, or of the source
        left = f"{target.name}{_PARTIAL}"
        goes_on = f", which goes on with {left}, or delete that file"
        raise StorageFullError(
            f"no room for the backup {target}: its disk is full; free some space and run it again"
            f"{goes_on if os.path.lexists(target.with_name(left)) else ''}"
        ) from exc


def _drop_useless(source: Adapter, partial: Path, opened: Opener) -> None:
    """Delete what an earlier backup left, unless all of it is still what the source has."""
    if not os.path.lexists(partial):
        return
    try:
        with opened(file_url(partial), "r") as end, source.snapshot():
            wanted, rows = source.models(), end.adapter.models()
            _refuse_others(end.adapter, partial)
            if rows and not end.adapter.meta().get(_BACKUP_OF):
                raise ArgumentError(
                    f"{partial} is a store and no unfinished backup; move it, or give the backup "
                    "another name"
                )
            # In the same order, too: a bare name means the last version.
            is_useful = (
                set(_by_version(end.adapter)) <= set(_by_version(source))
                and len(rows) <= len(wanted)
                and all(
                    (row.name, row.version) == (other.name, other.version)
                    and same_model(source, other, end.adapter, row)
                    for row, other in zip(rows, wanted, strict=False)
                )
            )
    except MissingStoreError:
        is_useful = True  # nothing yet: one was killed at its beginning, or somebody is there now
    if not is_useful:
        for end_of_name in ("", *_BESIDE):
            Path(f"{partial}{end_of_name}").unlink(missing_ok=True)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Let one backup at a time begin or end in a folder.

    What one has found there then still holds when it acts on it. The folder itself is locked, so
    nothing is left behind; some network file systems have no such lock.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # also of a child that was forked meanwhile
        os.close(handle)


def _by_version(adapter: Adapter) -> list[tuple[str, str, str]]:
    """Return (name, alias, version) of all aliases."""
    versions = {row.id: row.version for row in adapter.models()}
    return [(name, alias, versions.get(i, "")) for name, alias, i in adapter.aliases()]


def _refuse_others(partial: Adapter, path: Path) -> list[str]:
    """Raise ConflictError while somebody else writes that backup; return jobs that look so."""
    jobs = [(i, spec) for i, spec, cursor, _ in partial.jobs() if not job_is_dead(spec, cursor)]
    if _inode(path) in _writing or not all(job_is_ours(spec) for _, spec in jobs):
        raise ConflictError(
            f"another backup is being written to {path}; wait for it, or give this one another name"
        )
    return [job_id for job_id, _ in jobs]


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _alone(
    partial: Adapter, path: Path, mark: str, progress: Progress | None
) -> Iterator[Progress]:
    """Keep other backups away from an unfinished file; gives the progress that says we live."""
    job = Job(partial, "backup")
    collect_abandoned(partial)
    inode, is_ours = _inode(path), False

    def told(stage: str, done: int, total: int, /) -> None:
        job.keep_alive()
        if progress is not None:
            progress(stage, done, total)

    try:
        with partial.transaction():
            for left in _refuse_others(partial, path):
                partial.delete_job(left)
            _writing.add(inode)
            is_ours = True
            job.beat()
            partial.set_meta(_BACKUP_OF, mark)
        yield told
        with partial.transaction():
            job.end()
    except BaseException:
        if is_ours:
            with contextlib.suppress(PydedupError), partial.transaction():
                job.end()
        raise
    finally:
        if is_ours:
            _writing.discard(inode)


def _publish(partial: Path, target: Path, *, replace: bool) -> None:
    """Give a complete file its name, so that it is there after a crash of the machine too."""
    for end in _BESIDE:
        if Path(f"{partial}{end}").exists():
            raise ConflictError(f"{partial} is open elsewhere, so it is not complete; close it")
    sync(partial)
    if not replace:
        with contextlib.suppress(OSError):
            os.link(partial, target)  # not where a file appeared meanwhile, nor on every disk
        if target.exists() and not partial.samefile(target):
            raise ArgumentError(
                f"{target} appeared while its backup was made, which is complete in {partial}"
            )
    if target.exists() and partial.samefile(target):
        partial.unlink()
    else:
        partial.replace(target)
    sync(target.parent)
