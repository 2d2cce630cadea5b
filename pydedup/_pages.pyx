# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True, binding=True, embedsignature=False
"""Moving payloads between the store, a driver's buffers and the disk.

Stateless, and links nothing of the core. Bytes are copied once at most and with the GIL
released; what needs no copy gets none. Deliberately not here: anything that looks into a payload.
"""

from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    Py_buffer,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.string cimport memcpy

cdef extern from *:
    """
    #ifdef __linux__
    #include <fcntl.h>
    #include <sys/mman.h>
    #include <unistd.h>
    static void begin_writing(int handle) {
        (void)sync_file_range(handle, 0, 0, SYNC_FILE_RANGE_WRITE);
    }
    // What a mapping of a file is said to have in memory is what the system's cache has of it.
    static int has_ends(int handle, long long start, long long stop) {
        const long long page = sysconf(_SC_PAGESIZE);
        const long long begin = start / page * page;
        const size_t bytes = (size_t)(stop - begin);
        unsigned char first = 1;
        unsigned char last = 1;
        char* const map = (char*)mmap(NULL, bytes, PROT_READ, MAP_SHARED, handle, begin);
        if (map == (char*)MAP_FAILED) return 1;
        if (mincore(map, 1, &first) != 0) first = 1;
        if (mincore(map + (bytes - 1) / (size_t)page * (size_t)page, 1, &last) != 0) last = 1;
        (void)munmap(map, bytes);
        return first & last & 1;
    }
    #else
    static void begin_writing(int handle) { (void)handle; }
    static int has_ends(int handle, long long start, long long stop) {
        (void)handle, (void)start, (void)stop;
        return 1;
    }
    #endif
    """
    void begin_writing(int handle) nogil
    int has_ends(int handle, long long start, long long stop) nogil


def split_payload(payload, Py_ssize_t part_bytes):
    """Return ``payload`` as a list of consecutive parts of at most ``part_bytes``, not copied.

    An empty payload is one empty part, so that it leaves a trace when parts become rows.
    """
    if part_bytes < 1:
        raise ValueError(f"part_bytes is {part_bytes}; it must be at least 1")
    view = memoryview(payload).cast("B")
    cdef Py_ssize_t total = len(view)
    if total <= part_bytes:
        return [view]
    return [view[start : start + part_bytes] for start in range(0, total, part_bytes)]


def join_parts(parts):
    """Return the concatenation of contiguous buffers as ``bytes``; one ``bytes`` is returned as is.

    The copy is made with the GIL released, so other threads run while a large one is joined.
    """
    cdef list items = list(parts)
    cdef Py_ssize_t count = len(items)
    cdef Py_ssize_t total = 0
    cdef Py_ssize_t held = 0
    cdef Py_ssize_t i
    cdef char* to
    cdef Py_buffer* buffers
    if count == 1 and PyBytes_CheckExact(items[0]):
        return items[0]
    buffers = <Py_buffer*>PyMem_Malloc((count if count else 1) * sizeof(Py_buffer))
    if buffers == NULL:
        raise MemoryError()
    try:
        for i in range(count):
            PyObject_GetBuffer(items[i], &buffers[i], PyBUF_SIMPLE)
            held += 1
            total += buffers[i].len
        joined = PyBytes_FromStringAndSize(NULL, total)
        to = PyBytes_AS_STRING(joined)
        with nogil:
            for i in range(count):
                if buffers[i].len > 0:  # an empty buffer may be at no address at all
                    memcpy(to, buffers[i].buf, buffers[i].len)
                to += buffers[i].len
        return joined
    finally:
        for i in range(held):
            PyBuffer_Release(&buffers[i])
        PyMem_Free(buffers)


def scatter(source, parts):
    """Copy a contiguous buffer into writable ones, each going on where the one before ended.

    With the GIL released. Raises ValueError when the source has not as much as they take.
    """
    cdef list items = list(parts)
    cdef Py_ssize_t count = len(items)
    cdef Py_ssize_t total = 0
    cdef Py_ssize_t held = 0
    cdef Py_ssize_t i
    cdef const char* at
    cdef Py_buffer given
    cdef Py_buffer* buffers = <Py_buffer*>PyMem_Malloc((count if count else 1) * sizeof(Py_buffer))
    if buffers == NULL:
        raise MemoryError()
    try:
        for i in range(count):
            PyObject_GetBuffer(items[i], &buffers[i], PyBUF_WRITABLE)
            held += 1
            total += buffers[i].len
        PyObject_GetBuffer(source, &given, PyBUF_SIMPLE)
        try:
            if given.len < total:
                raise ValueError(f"source has {given.len} bytes; the parts take {total}")
            at = <const char*>given.buf
            with nogil:
                for i in range(count):
                    if buffers[i].len > 0:  # an empty buffer may be at no address at all
                        memcpy(buffers[i].buf, at, buffers[i].len)
                    at += buffers[i].len
        finally:
            PyBuffer_Release(&given)
    finally:
        for i in range(held):
            PyBuffer_Release(&buffers[i])
        PyMem_Free(buffers)


def begin_writeback(int handle):
    """Let the system begin to write a file of this handle to its disk, if it can be told so.

    A hint: nothing is durable for it, and an error of the disk is left to who syncs the file.
    """
    with nogil:
        begin_writing(handle)


def is_in_memory(int handle, long long start, long long stop):
    """Return whether the system has both ends of a part of a file in memory; brings in nothing.

    Also where the system cannot tell. ``start`` is before ``stop``, both within the file.
    """
    cdef int here
    if not 0 <= start < stop:
        raise ValueError(f"start is {start}, stop {stop}; a part of a file has a byte at least")
    with nogil:
        here = has_ends(handle, start, stop)
    return here != 0
