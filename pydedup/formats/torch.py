# SPDX-License-Identifier: Apache-2.0
"""torch checkpoints (``.pt``, ``.pth``, ``.bin``) and torch modules.

A checkpoint is a pickle with the bytes of its storages beside it. The pickle goes through
``torch.load(weights_only=True)`` and nothing else, so code in it never runs. For the zip format
``torch.load`` maps the file; from where its storages lie in that mapping we learn where they lie
in the file, drop the mapping, and then read each tensor as a range of the file with the zip
checksum verified. (Reading through torch's own mapping would leave every page that was ever
touched resident.) The old format without zip cannot be read in parts: its tensors are in memory
while the source is open.
"""

from __future__ import annotations

import mmap
import pickle
import re
import sys
import tempfile
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pydedup.errors import FormatError, UnsupportedFormatError
from pydedup.formats._files import open_raw, write_array
from pydedup.formats._zip import ZipMembers
from pydedup.formats.base import Array, ModelSource, Outgoing, TensorEntry
from pydedup.formats.infer_torch import infer_from_torch
from pydedup.formats.torch_checkpoint import find_weights, is_extra
from pydedup.formats.torch_tensors import by_dtype, require_torch, to_numpy, torch_entry
from pydedup.graph import Graph

if TYPE_CHECKING:
    import torch

__all__ = [
    "ModuleSource",
    "TorchSource",
    "looks_like_legacy",
    "write",
]

#: The number with which files of the old format begin, as pickled.
_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_ALIGNMENT = 64
_PAGE = mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor's elements are: a zip member, and a view of its storage in elements."""

    member: str
    start: int
    stride: tuple[int, ...]


class TorchSource(ModelSource):
    """Reader of a checkpoint file. Safe between threads."""

    format = "torch"

    def __init__(
        self, path: Path, weights_key: str | None = None, *, every_set: bool = False
    ) -> None:
        super().__init__(str(path))
        require_torch()
        self._wanted, self._every_set = weights_key, every_set
        self._zip: ZipMembers | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._places: dict[str, _Place] = {}
        with self._closed_on_failure():
            with open_raw(path) as raw:
                head = raw.read_at(0, min(raw.size, 4))
            if head[:2] == b"PK":
                self._zip = ZipMembers(path)
            self._open(path)

    def close(self) -> None:
        """Close the file; arrays from it stay valid."""
        self._tensors = {}
        if self._zip is not None:
            self._zip.close()

    def _open(self, path: Path) -> None:
        mapped = self._zip is not None and _can_map(self._zip, path)
        loaded = _load(path, mapped)
        found = find_weights(loaded, str(path), self._wanted, every_set=self._every_set)
        state, self.weights_key, self.left_out = found.tensors, found.key, found.left_out
        self._set_entries(
            torch_entry(name, tensor, f"{path}: tensor {name!r}") for name, tensor in state.items()
        )
        if mapped and self._zip is not None:
            members = _members_of(loaded, self._zip)
            if members is not None:
                for name, tensor in state.items():
                    self._places[name] = _Place(
                        members.get(tensor.untyped_storage().data_ptr(), ""),
                        int(tensor.storage_offset()),
                        tuple(int(step) for step in tensor.stride()),
                    )
                return
        self._tensors = state

    def _read(self, entry: TensorEntry) -> Array:
        place = self._places.get(entry.name)
        if place is None:
            return to_numpy(self._tensors[entry.name])
        if entry.nbytes == 0:
            return np.empty(entry.shape, entry.dtype.numpy)
        assert self._zip is not None
        # torch can be told to write no checksums; it leaves zeros then.
        self._zip.verify(place.member, trust_zero=True)
        itemsize = entry.dtype.itemsize
        start = self._zip.offset(place.member) + place.start * itemsize
        extent = 1 + sum((n - 1) * s for n, s in zip(entry.shape, place.stride, strict=True))
        if place.start * itemsize + extent * itemsize > self._zip.members[place.member].file_size:
            raise FormatError(f"{self.description}: tensor {entry.name!r} leaves its storage")
        # Strides are applied to plain unsigned integers: numpy loses the names of bfloat16 and
        # 8-bit floats on the way.
        flat = self._zip.raw.array(start, np.dtype(f"u{itemsize}"), (extent,))
        if _is_contiguous(entry.shape, place.stride):
            return flat.view(entry.dtype.numpy).reshape(entry.shape)
        steps = [step * itemsize for step in place.stride]
        view = np.lib.stride_tricks.as_strided(flat, entry.shape, steps, writeable=False)
        return view.copy("C").view(entry.dtype.numpy)


class ModuleSource(ModelSource):
    """Parameters and persistent buffers of a ``torch.nn.Module``."""

    format = "torch-module"

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(f"torch module {type(module).__name__}")
        import torch

        self._module = module
        self._tensors: dict[str, torch.Tensor] = {}
        left_out = []
        for name, value in module.state_dict(keep_vars=True).items():
            if isinstance(value, torch.Tensor):
                self._tensors[name] = value
            elif is_extra(name):
                left_out.append(name)
            else:
                raise UnsupportedFormatError(
                    f"{self.description}: {name!r} is a {type(value).__name__}, not a tensor, as "
                    "of quantised layers; store the module as it was before"
                )
        self.left_out = tuple(left_out)
        self._set_entries(
            torch_entry(name, tensor, f"{self.description}: tensor {name!r}")
            for name, tensor in self._tensors.items()
        )

    @property
    def graph(self) -> Graph | None:
        """The layers, for plain ``nn.Sequential`` models."""
        return infer_from_torch(self._module)

    def _read(self, entry: TensorEntry) -> Array:
        return to_numpy(self._tensors[entry.name])


def looks_like_legacy(head: bytes) -> bool:
    """Return whether a file begins like torch's format before zip files."""
    return head[:1] == b"\x80" and _LEGACY_MAGIC in head[:32]


def write(path: Path, outgoing: Outgoing) -> None:
    """Write a state dict with ``torch.save``; tied tensors share one storage in the file.

    ``torch.save`` wants all tensors at once. They are spooled, one at a time, to an unnamed
    temporary file beside the target, and given to torch as views of it: memory stays at one
    tensor, disk space is needed twice for the moment.
    """
    require_torch()
    import torch

    torch_dtypes = by_dtype()
    places: dict[Hashable, int] = {}
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        for entry in outgoing.entries:
            if entry.nbytes and entry.key not in places:
                spool.write(bytes(-spool.tell() % _ALIGNMENT))
                places[entry.key] = spool.tell()
                write_array(spool, outgoing.fetch(entry))
        spool.flush()
        size = spool.tell()
        mapping = mmap.mmap(spool.fileno(), size) if size else None
        state: dict[str, torch.Tensor] = {}
        views: dict[Hashable, torch.Tensor] = {}
        for entry in outgoing.entries:
            if mapping is None or not entry.nbytes:
                state[entry.name] = torch.empty(entry.shape, dtype=torch_dtypes[entry.dtype])
                continue
            if entry.key not in views:
                raw = np.frombuffer(mapping, np.uint8, entry.nbytes, places[entry.key])
                views[entry.key] = torch.from_numpy(raw).view(torch_dtypes[entry.dtype])
            state[entry.name] = views[entry.key].reshape(entry.shape)
        # Through a file of ours, so that a full disk is first of all an OSError; torch then fails
        # to finish the archive, too, and says only that.
        try:
            with path.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as exc:
            if isinstance(exc.__context__, OSError):
                raise exc.__context__ from exc
            raise


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for extent, step in zip(reversed(shape), reversed(stride), strict=True):
        if extent != 1 and step != expected:
            return False
        expected *= extent
    return True


def _can_map(archive: ZipMembers, path: Path) -> bool:
    """Return whether the storages' bytes in the file are the tensors' bytes."""
    if any(name.rpartition("/")[2] == "constants.pkl" for name in archive.members):
        raise UnsupportedFormatError(
            f"{path} is a TorchScript archive, a program with its weights; load it with "
            "torch.jit.load and give its state_dict()"
        )
    # torch takes a path with this suffix for a safetensors file, whatever is in it.
    if path.suffix == ".safetensors" or not all(map(archive.is_stored, archive.members)):
        return False
    for name, info in archive.members.items():
        if name.rpartition("/")[2] == "byteorder":
            order = archive.raw.read_at(archive.offset(name), min(info.file_size, 16))
            return order == sys.byteorder.encode()
    return True


def _load(path: Path, mapped: bool) -> object:
    import torch

    try:
        if mapped:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    # Whatever a damaged pickle makes torch raise (from AssertionError to struct.error), it is
    # the file's fault. Running out of memory and Ctrl-C are not, and pass.
    except MemoryError:
        raise
    except Exception as exc:
        found = _GLOBAL.search(str(exc)) if isinstance(exc, pickle.UnpicklingError) else None
        if found:
            raise FormatError(
                f"{path} holds the Python object {found.group(1)} and not only tensors; it is "
                "refused because unpickling it can run code. Save model.state_dict() instead"
            ) from exc
        if isinstance(exc, AttributeError) and "UntypedStorage" in str(exc):
            raise UnsupportedFormatError(
                f"{path} is in torch's old format and holds tensors of a dtype that came after it "
                "(uint16, uint32, uint64, 8-bit floats), which torch itself does not read back; "
                "save it without _use_new_zipfile_serialization=False"
            ) from exc
        reason = (str(exc) or type(exc).__name__).splitlines()[0][:200]
        raise FormatError(f"{path} is no readable torch checkpoint: {reason}") from exc


def _storages(value: object) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of every storage in a loaded checkpoint."""
    import torch

    pending = [value]
    seen: set[int] = set()  # what is there many times, or holds itself
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.layout == torch.strided and item.device.type == "cpu":
                storage = item.untyped_storage()
                yield storage.data_ptr(), storage.nbytes()
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, list | tuple | set):
            pending.extend(item)


def _members_of(loaded: object, archive: ZipMembers) -> dict[int, str] | None:
    """Return which zip member each storage's address belongs to, ``None`` unless it is certain.

    All storages are slices of one page-aligned mapping of the file, so address minus file offset
    is the same for all. Only one such difference may fit all addresses and sizes.
    """
    addresses = {ptr: size for ptr, size in _storages(loaded) if size}
    if not addresses:
        return {}
    records = {
        archive.offset(name): name
        for name, info in archive.members.items()
        if info.file_size and name.rpartition("/")[0].endswith("data")
    }
    first = min(addresses)
    fitting = [
        base
        for base in (first - offset for offset in records)
        if base % _PAGE == 0
        and all(
            ptr - base in records
            and archive.members[records[ptr - base]].file_size == addresses[ptr]
            for ptr in addresses
        )
    ]
    if len(fitting) != 1:
        return None
    return {ptr: records[ptr - fitting[0]] for ptr in addresses}
