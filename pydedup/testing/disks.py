# SPDX-License-Identifier: Apache-2.0
"""A small disk of a test's own, to be filled or made read-only. Only root may have one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

__all__ = ["DiskRefusedError", "SmallDisk"]


class DiskRefusedError(RuntimeError):
    """The system lets nobody like us mount a disk; says what it said."""


class SmallDisk:
    """A file system in memory, mounted where a folder is made for it.

    Parameters
    ----------
    folder
        Is made, and is gone after :meth:`unmount`.
    mib
        What fits on the disk, in MiB.

    Raises
    ------
    DiskRefusedError
        Without the rights of root, or where a container withholds that of mounting.
    """

    def __init__(self, folder: Path, mib: int) -> None:
        self.folder = folder
        if shutil.which("mount") is None:
            raise DiskRefusedError("no disk can be mounted: there is no program `mount`")
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={mib}m,mode=755", "tmpfs", str(folder)]
        done = subprocess.run(["mount", *options], check=False, capture_output=True, text=True)
        if done.returncode != 0:
            folder.rmdir()
            said = " ".join(done.stderr.split())
            raise DiskRefusedError(
                f"no disk can be mounted ({said}); that takes root, in a container with the "
                "capability SYS_ADMIN"
            )

    def remount(self, option: str) -> None:
        """Mount it anew with this option, such as ``ro``."""
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.folder)], check=True)

    def unmount(self) -> None:
        """Take it away, with all that is on it."""
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
        self.folder.rmdir()
