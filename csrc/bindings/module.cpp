// SPDX-License-Identifier: Apache-2.0
// Creates _core and calls the registrars, nothing else.
#include "bindings.hpp"

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
    m.doc() = "Native core of pydedup. Private: use the facades (pydedup.hashing, ...).";
    pydedup::bind_errors(m);
    pydedup::bind_cpu(m);
    pydedup::bind_hash(m);
    pydedup::bind_codec(m);
    pydedup::bind_storage(m);
    pydedup::bind_packing(m);
    pydedup::bind_gemm(m);
    pydedup::bind_similarity(m);
    pydedup::bind_rows(m);
    pydedup::bind_conv(m);
}
