# SPDX-License-Identifier: Apache-2.0
"""numpy's ``.npz`` and ``.npy`` files.

Arrays of Python objects need pickle and are refused. Arrays stored without compression are views
of the file where they are aligned; ours always are (the zip header is padded), numpy's sometimes.
A ``.npy`` file has no name for its array: it is ``arr_0``, as numpy calls unnamed arrays.

numpy has no name for bfloat16 and 8-bit floats and writes them as raw bytes that nobody can tell
apart again, so they are neither written nor read here.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format

from pydedup.errors import ArgumentError, FormatError, UnsupportedFormatError
from pydedup.formats._files import RawFile, write_array
from pydedup.formats._zip import ZipMembers, zip_to_write
from pydedup.formats.base import Array, ModelSource, Outgoing, TensorEntry
from pydedup.types import DType

__all__ = ["NpySource", "NpzSource", "write_npy", "write_npz"]

#: The name of the only array of a ``.npy`` file.
_NPY_NAME = "arr_0"

_NPY_MAGIC = b"\x93NUMPY"
#: numpy's own limit: parsing longer literals can exhaust the interpreter's stack.
_MAX_HEADER = 10_000
_ALIGNMENT = 64
#: Local zip header without name, and the 64-bit sizes that zipfile adds.
_ZIP_HEADER, _ZIP64_EXTRA = 30, 20
_NAMELESS = (DType.BF16, DType.F8_E4M3, DType.F8_E5M2)
#: Identifier that Android's zipalign uses for padding; readers skip it.
_PADDING_ID = 0xD935


@dataclass(frozen=True, slots=True)
class _Header:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    data_start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class NpySource(ModelSource):
    """Reader of one ``.npy`` file. Safe between threads."""

    format = "npy"

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._raw = RawFile(path)
        with self._closed_on_failure():
            head = io.BytesIO(self._raw.read_at(0, min(self._raw.size, 16 + _MAX_HEADER)))
            self._header = _read_header(head, self.description)
            dtype = _dtype(self._header.dtype, f"{path}")
            expected = self._header.data_start + self._header.nbytes
            if expected != self._raw.size:
                raise FormatError(
                    f"{path} has {self._raw.size} bytes, its header describes {expected}; it is "
                    "truncated or holds more than one array"
                )
            self._set_entries([TensorEntry(_NPY_NAME, dtype, self._header.shape, key=_NPY_NAME)])

    def close(self) -> None:
        """Close the file; arrays from it stay valid."""
        self._raw.close()

    def _read(self, entry: TensorEntry) -> Array:
        return _stored(self._raw, self._header, 0)


class NpzSource(ModelSource):
    """Reader of one ``.npz`` file. Safe between threads."""

    format = "npz"

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._zip = ZipMembers(path)
        self._headers: dict[str, tuple[str, _Header]] = {}
        with self._closed_on_failure():
            self._set_entries(list(self._parse()))

    def close(self) -> None:
        """Close the file; arrays from it stay valid."""
        self._zip.close()

    def _parse(self) -> Iterator[TensorEntry]:
        left_out = []
        for member, info in self._zip.members.items():
            name = member.removesuffix(".npy")
            with self._zip.stream(member) as stream:
                if name == member and stream.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
                    left_out.append(member)
                    continue
            with self._zip.stream(member) as stream:
                header = _read_header(stream, f"{self.description}: array {name!r}")
            dtype = _dtype(header.dtype, f"{self.description}: array {name!r}")
            if header.data_start + header.nbytes != info.file_size:
                raise FormatError(
                    f"{self.description}: array {name!r} should have {header.nbytes} bytes, "
                    f"{info.file_size - header.data_start} are there"
                )
            self._headers[name] = member, header
            yield TensorEntry(name, dtype, header.shape, key=member)
        self.left_out = tuple(left_out)

    def _read(self, entry: TensorEntry) -> Array:
        member, header = self._headers[entry.name]
        if self._zip.is_stored(member):
            self._zip.verify(member)
            return _stored(self._zip.raw, header, self._zip.offset(member))
        data = np.empty(header.nbytes, np.uint8)
        self._zip.inflate(member, header.data_start, data)
        array = _arranged(data.view(header.dtype), header)
        return array.astype(header.dtype.newbyteorder("="), copy=False)


def write_npy(path: Path, outgoing: Outgoing) -> None:
    """Write the only tensor of a model as a ``.npy`` file."""
    if len(outgoing.entries) != 1:
        raise UnsupportedFormatError(
            f"a .npy file holds one array, the model has {len(outgoing.entries)}; export to .npz"
        )
    entry = outgoing.entries[0]
    header = _header_bytes(entry)
    with path.open("wb") as file:
        file.write(header)
        write_array(file, outgoing.fetch(entry))


def write_npz(path: Path, outgoing: Outgoing) -> None:
    """Write a ``.npz`` file without compression, tensor by tensor, every array aligned."""
    headers = [_header_bytes(entry) for entry in outgoing.entries]
    with zip_to_write(path) as archive:
        for entry, header in zip(outgoing.entries, headers, strict=True):
            info = zipfile.ZipInfo(entry.name + ".npy")
            if len(info.filename.encode()) > 0xFFFF:
                raise UnsupportedFormatError(f"tensor name {entry.name!r:.60} is too long for zip")
            start = archive.start_dir + _ZIP_HEADER + len(info.filename.encode()) + _ZIP64_EXTRA
            info.extra = _padding(start)
            with archive.open(info, "w", force_zip64=True) as member:
                member.write(header)
                write_array(member, outgoing.fetch(entry))


def _padding(start: int) -> bytes:
    needed = -start % _ALIGNMENT
    if needed == 0:
        return b""
    if needed < 4:
        needed += _ALIGNMENT
    return struct.pack("<HH", _PADDING_ID, needed - 4) + bytes(needed - 4)


def _header_bytes(entry: TensorEntry) -> bytes:
    if entry.dtype in _NAMELESS:
        raise UnsupportedFormatError(
            f"tensor {entry.name!r} is {entry.dtype.label}, which numpy files cannot name; "
            "export to safetensors, or load with another dtype"
        )
    buffer = io.BytesIO()
    header = {
        "descr": npy_format.dtype_to_descr(entry.dtype.numpy),
        "fortran_order": False,
        "shape": entry.shape,
    }
    npy_format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _read_header(stream: IO[bytes], where: str) -> _Header:
    try:
        version = npy_format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = npy_format.read_array_header_1_0(stream, _MAX_HEADER)
        elif version == (2, 0):
            shape, fortran, dtype = npy_format.read_array_header_2_0(stream, _MAX_HEADER)
        else:
            raise UnsupportedFormatError(
                f"{where} has npy version {version[0]}.{version[1]}, which only arrays of records "
                "need; convert it to plain arrays"
            )
    except FormatError:
        raise
    # numpy tokenises and evaluates the header as a Python literal, which can raise anything from
    # TokenError to RecursionError.
    except Exception as exc:
        if "not a valid dtype" in str(exc):
            raise UnsupportedFormatError(
                f"{where} has an element type that numpy cannot name back ({exc}); save it as "
                "safetensors"
            ) from exc
        raise FormatError(f"{where} has a damaged npy header: {exc}") from exc
    if any(extent < 0 for extent in shape):
        raise FormatError(f"{where} has the impossible shape {shape}")
    return _Header(dtype, tuple(shape), fortran, stream.tell())


def _dtype(dtype: np.dtype[Any], where: str) -> DType:
    if dtype.hasobject:
        raise FormatError(
            f"{where} holds Python objects, which only pickle can load; it is refused, as "
            "unpickling can run code"
        )
    if dtype.kind == "V" and dtype.names is None:
        raise UnsupportedFormatError(
            f"{where} holds raw bytes ({dtype}), which is how numpy writes bfloat16 and 8-bit "
            "floats; save it as safetensors"
        )
    try:
        return DType.of(dtype)
    except ArgumentError as exc:
        raise UnsupportedFormatError(f"{where}: {exc}") from exc


def _stored(raw: RawFile, header: _Header, base: int) -> Array:
    flat = raw.array(base + header.data_start, header.dtype, (math.prod(header.shape),))
    return _arranged(flat, header)


def _arranged(flat: Array, header: _Header) -> Array:
    if header.fortran and len(header.shape) > 1:
        return np.ascontiguousarray(flat.reshape(header.shape[::-1]).T)
    return flat.reshape(header.shape)
