// SPDX-License-Identifier: Apache-2.0
// Creates _core and calls the registrars, nothing else.
#include "bindings.hpp"

PYBIND11_MODULE(_core_of_main, m, pybind11::mod_gil_not_used()) {
    m.doc() = "Native core of pydedup. Private: use the facades (pydedup.hashing, ...).";
    pydedup::bind_errors(m);
    pydedup::bind_cpu(m);
    pydedup::bind_hash(m);
    pydedup::bind_codec(m);
    pydedup::bind_pages(m);
    pydedup::bind_storage(m);
    pydedup::bind_packing(m);
    pydedup::bind_gemm(m);
    pydedup::bind_similarity(m);
    pydedup::bind_rows(m);
    pydedup::bind_conv(m);
}

/// What Python calls. It asks by itself, from 3.12 on, whether a module may be used in a
/// sub-interpreter; before, pybind11 would wait there for ever for a GIL that its thread has.
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
#if PY_VERSION_HEX < 0x030C0000
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError,
                        "pydedup cannot be used in a sub-interpreter; use the main one (under "
                        "mod_wsgi WSGIApplicationGroup %{GLOBAL})");
        return nullptr;
    }
#endif
    return PyInit__core_of_main();
}
