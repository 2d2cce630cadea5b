# SPDX-License-Identifier: Apache-2.0
"""An HDF5 file taken apart into numeric datasets and everything else, and put together again.

Everything else (groups, attributes with their exact types, datasets that are no numbers) is kept
as a *skeleton*: an HDF5 file in which the numeric datasets are declared but have no data. Filling
a copy of it gives back the file that Keras wrote, whatever version of Keras that was.

Links that lead to other files, external storage and virtual datasets are refused: they would read
files that nobody named.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pydedup.errors import ArgumentError, FormatError, UnsupportedFormatError, not_installed
from pydedup.formats._files import RawFile
from pydedup.formats._hdf5_probe import Window, survives
from pydedup.formats.base import Array
from pydedup.types import DType

__all__ = [
    "OVERLAYS",
    "Dataset",
    "build_skeleton",
    "fill_skeleton",
    "hdf5_errors",
    "import_h5py",
    "is_group",
    "numeric",
    "open_file",
    "read_dataset",
]

#: Text datasets of layers (vocabularies) are kept in the skeleton up to this size.
_MAX_INLINE = 64 << 20
#: No skeleton has more; none of a real model comes near.
_MAX_SKELETON = 1 << 30
#: Compressed datasets that claim more than this times their stored size are bombs or damaged.
_MAX_EXPANSION = 1100
#: What Keras (the first) and we write as opaque bytes and name in an attribute.
OVERLAYS = {
    "bfloat16": DType.BF16,
    "float8_e4m3fn": DType.F8_E4M3,
    "float8_e5m2": DType.F8_E5M2,
}


@dataclass(frozen=True, slots=True)
class Dataset:
    """A numeric dataset: its path, type, and where its bytes are when they lie together."""

    path: str
    dtype: DType
    shape: tuple[int, ...]
    stored: np.dtype[Any]
    offset: int | None
    address: int


def import_h5py() -> Any:
    """Return the module h5py.

    Raises
    ------
    UnsupportedFormatError
        When it is not installed.
    """
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as exc:
        raise UnsupportedFormatError(not_installed("a Keras or HDF5 file", exc, "keras")) from exc
    return h5py


@contextlib.contextmanager
def hdf5_errors(where: str) -> Iterator[None]:
    """Turn what h5py raises on damaged files into FormatError."""
    try:
        yield
    except FormatError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, UnicodeDecodeError) as exc:
        if isinstance(exc, ArgumentError):
            raise
        reason = str(exc).splitlines()[0][:200] if str(exc) else type(exc).__name__
        raise FormatError(f"{where} is a damaged or truncated HDF5 file: {reason}") from exc


def numeric(
    file: Any, skip: Callable[[str], bool], where: str, *, skeleton: bool = False
) -> Iterator[Dataset]:
    """Yield the numeric datasets outside of groups that ``skip`` names.

    Those of a ``skeleton`` have no data yet, whatever their size.

    A dataset that is reachable by two names (a hard link) is yielded once per name, with the same
    ``address``.

    Raises
    ------
    UnsupportedFormatError
        For numbers of a type that cannot be stored, such as complex ones.
    """
    for path, item in _walk(file, "", skip, where):
        if is_group(item):
            continue
        dtype = _dtype_of(item)
        if dtype is None:
            is_weight = item.dtype.kind in "fc" or _is_opaque(item)
            if is_weight and not skeleton and item.shape is not None:
                raise _refused(item, path, where)  # of a type that no store has
            continue
        _check_layout(item, path, where, skeleton=skeleton)
        offset = None
        if file.userblock_size == 0 and _is_plain(item):
            offset = item.id.get_offset()
        yield Dataset(path, dtype, tuple(item.shape), item.dtype, offset, _address(item))


def build_skeleton(file: Any, skip: Callable[[str], bool], where: str) -> bytes:
    """Return the skeleton of an open file, compressed, the same for the same content."""
    h5py = import_h5py()
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as target:
        _copy_attributes(file, target, where)
        made: dict[int, Any] = {}
        for path, item in _walk(file, "", skip, where):
            address = _address(item)
            if address in made:
                target[path] = made[address]
                continue
            if is_group(item):
                copy = target.create_group(path)
            elif _dtype_of(item) is not None:
                copy = target.create_dataset(path, shape=item.shape, dtype=item.dtype)
            else:
                copy = _copy_inline(item, target, path, where)
            _copy_attributes(item, copy, where)
            made[address] = copy
    if buffer.getbuffer().nbytes > _MAX_SKELETON:
        raise UnsupportedFormatError(
            f"{where} has over {_MAX_SKELETON} bytes beside its numbers, which cannot be stored"
        )
    return gzip.compress(buffer.getvalue(), mtime=0)


def fill_skeleton(
    path: Path, skeleton: bytes, fetch: Callable[[Any, Dataset], Array], where: str
) -> None:
    """Write the skeleton to ``path`` and each numeric dataset's data into it, one at a time.

    ``fetch`` gets the open file and the dataset that the data must fit. A skeleton is from a store,
    which need not be one's own: what ``where`` names may lead to other files, which HDF5 would
    write, be a bomb, or crash the library.

    Raises
    ------
    FormatError
        When the skeleton is damaged, or leads to other files.
    """
    h5py = import_h5py()
    with path.open("w+b") as file, gzip.open(io.BytesIO(skeleton)) as packed:
        for piece in _unpacked(packed, where):
            file.write(piece)
        file.flush()
        if not survives(file.fileno(), 0, file.tell()):
            raise FormatError(f"{where} makes the HDF5 library crash or hang; it is damaged")
    with hdf5_errors(where):
        target = h5py.File(path, "r+")
    with target:
        done: set[int] = set()
        with hdf5_errors(where):
            datasets = list(numeric(target, lambda _: False, where, skeleton=True))
        for dataset in datasets:
            if dataset.address in done or not math.prod(dataset.shape):
                continue
            done.add(dataset.address)
            _fill_dataset(target, dataset, fetch(target, dataset))


def _unpacked(packed: gzip.GzipFile, where: str) -> Iterator[bytes]:
    """Yield what is in a skeleton. Raises FormatError, also where it is a bomb."""
    left = _MAX_SKELETON
    while True:
        try:
            piece = packed.read(1 << 20)
        except (OSError, EOFError, zlib.error) as exc:
            raise FormatError(f"{where} cannot be unpacked: {exc}") from exc
        left -= len(piece)
        if left < 0:
            raise FormatError(f"{where} has over {_MAX_SKELETON} bytes when it is unpacked")
        if not piece:
            return
        yield piece


def _fill_dataset(target: Any, dataset: Dataset, array: Array) -> None:
    data = array.view(dataset.stored) if dataset.stored.kind == "V" else array
    target[dataset.path].write_direct(data)


def _address(item: Any) -> int:
    """Return where an HDF5 object is in its file: what is linked twice has one address."""
    return int(import_h5py().h5o.get_info(item.id).addr)


def is_group(item: Any) -> bool:
    """Return whether an HDF5 object is a group."""
    return isinstance(item, import_h5py().Group)


def read_dataset(file: Any, dataset: Dataset) -> Array:
    """Return one dataset through HDF5 (chunked or compressed ones have no single place)."""
    item = file[dataset.path]
    array = np.empty(dataset.shape, item.dtype.newbyteorder("="))
    if array.size:
        item.read_direct(array)
    return array if dataset.stored.kind != "V" else array.view(dataset.dtype.numpy)


def open_file(raw: RawFile, offset: int, size: int) -> Any:
    """Open the HDF5 file in a range of a file, after a trial run in another process.

    Raises
    ------
    FormatError
        When the HDF5 library refuses the file, or crashes over it.
    """
    if not survives(raw.fileno(), offset, size):
        raise FormatError(f"{raw.path} makes the HDF5 library crash or hang; it is damaged")
    window = Window(lambda at, n_bytes: raw.read_at(offset + at, n_bytes), size)
    with hdf5_errors(str(raw.path)):
        return import_h5py().File(io.BufferedReader(window, 1 << 16), "r")


def _walk(
    group: Any, prefix: str, skip: Callable[[str], bool], where: str
) -> Iterator[tuple[str, Any]]:
    """Yield (path, object) of all groups and datasets, parents first."""
    h5py = import_h5py()
    pending = [(group, prefix)]
    seen = {_address(group)}
    while pending:
        current, base = pending.pop(0)
        for name in current:
            path = f"{base}/{name}" if base else name
            if skip(path):
                continue
            link = current.get(name, getlink=True)
            if link is None:
                raise FormatError(f"{where} is a damaged HDF5 file: {path!r} leads nowhere")
            if not isinstance(link, h5py.HardLink):
                raise FormatError(
                    f"{where}: {path!r} is a {type(link).__name__}, which could lead to other "
                    "files; it is refused"
                )
            item = current[name]
            if isinstance(item, h5py.Group):
                address = _address(item)
                if address in seen:
                    raise FormatError(f"{where}: group {path!r} is linked twice; it is refused")
                seen.add(address)
                yield path, item
                pending.append((item, path))
            elif isinstance(item, h5py.Dataset):
                yield path, item
            # A named datatype has no data.


def _dtype_of(dataset: Any) -> DType | None:
    """Return the element type, or ``None`` for datasets that are no numbers."""
    overlay = dataset.attrs.get("dtype")
    if isinstance(overlay, bytes):
        overlay = overlay.decode("ascii", "replace")
    if dataset.dtype.kind == "V" and isinstance(overlay, str):
        found = OVERLAYS.get(overlay)
        return found if found is not None and found.itemsize == dataset.dtype.itemsize else None
    if dataset.shape is None:
        return None
    try:
        return DType.of(dataset.dtype)
    except ArgumentError:
        return None


def _is_plain(item: Any) -> bool:
    """Return whether a dataset lies in the file as an array of its ``dtype`` does in memory.

    h5py gives the nearest dtype of types that numpy lacks, such as integers of 12 bits.
    """
    if item.chunks is not None or item.compression:
        return False
    if item.id.get_storage_size() != math.prod(item.shape) * item.dtype.itemsize:
        return False
    h5t = import_h5py().h5t
    stored = item.id.get_type()
    return stored.get_class() == h5t.OPAQUE or bool(
        stored == h5t.py_create(item.dtype, logical=True)
    )


def _check_layout(item: Any, path: str, where: str, *, skeleton: bool = False) -> None:
    if item.external or item.is_virtual:
        raise FormatError(f"{where}: dataset {path!r} keeps its data in other files; it is refused")
    if skeleton:
        return
    n_bytes = math.prod(item.shape) * item.dtype.itemsize
    stored = item.id.get_storage_size()
    # One that was never written has no place in the file, whatever size it claims.
    apart = item.chunks is not None or item.id.get_offset() is None
    if apart and n_bytes > (1 << 20) + _MAX_EXPANSION * stored:
        raise FormatError(
            f"{where}: dataset {path!r} claims {n_bytes} bytes out of {stored}; it is damaged"
        )


def _copy_attributes(source: Any, target: Any, where: str) -> None:
    h5py = import_h5py()
    for name in source.attrs:
        attribute = source.attrs.get_id(name)
        if attribute.get_type().get_class() == h5py.h5t.REFERENCE:
            raise UnsupportedFormatError(
                f"{where}: attribute {name!r} refers to another object, which no Keras file does"
            )
        # The low-level copy keeps fixed-length, padded and variable-length text apart.
        copy = h5py.h5a.create(
            target.id, attribute.name, attribute.get_type(), attribute.get_space()
        )
        if attribute.get_space().get_simple_extent_type() == h5py.h5s.NULL:
            continue
        value = np.empty(attribute.shape, attribute.dtype)
        attribute.read(value)
        copy.write(value)


def _copy_inline(item: Any, target: Any, path: str, where: str) -> Any:
    if item.shape is None:
        return target.create_dataset(path, data=import_h5py().Empty(item.dtype))
    _check_layout(item, path, where)
    if item.id.get_storage_size() > _MAX_INLINE:
        raise _refused(item, path, where)
    return target.create_dataset(path, data=item[()], dtype=item.dtype)


def _is_opaque(dataset: Any) -> bool:
    """Return whether it holds bytes as Keras leaves bf16 and 8-bit floats, without their type."""
    return dataset.dtype.kind == "V" and not dataset.dtype.names and dataset.dtype.itemsize <= 2


def _refused(dataset: Any, path: str, where: str) -> UnsupportedFormatError:
    if _is_opaque(dataset):
        return UnsupportedFormatError(
            f"{where}: dataset {path!r} has bytes whose type the file does not name, as Keras "
            "leaves weights of bfloat16 in a legacy .h5 file; save the model as .keras"
        )
    refusal = DType.refusal(in_pairs=dataset.dtype.kind == "c")
    return UnsupportedFormatError(
        f"{where}: dataset {path!r} has dtype {dataset.dtype}, which {refusal}"
    )
