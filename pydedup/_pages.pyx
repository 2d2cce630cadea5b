# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True, binding=True, embedsignature=False
"""Moving payloads between the store, a driver's buffers and the disk.

Stateless, and links nothing of the core. Bytes are copied once at most and with the GIL
released; what needs no copy gets none. Deliberately not here: anything that looks into a payload.
"""

from cpython.buffer cimport (
    PyBUF_SIMPLE,
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
    static void begin_writing(int handle) {
        (void)sync_file_range(handle, 0, 0, SYNC_FILE_RANGE_WRITE);
    }
    #else
    static void begin_writing(int handle) { (void)handle; }
    #endif
    """
    void begin_writing(int handle) nogil


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


def begin_writeback(int handle):
    """Let the system begin to write a file of this handle to its disk, if it can be told so.

    A hint: nothing is durable for it, and an error of the disk is left to who syncs the file.
    """
    with nogil:
        begin_writing(handle)
