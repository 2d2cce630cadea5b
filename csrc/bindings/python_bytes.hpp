// SPDX-License-Identifier: Apache-2.0
// Python bytes as memory that C++ owns a share of: no copy, and the last share may be dropped on
// any thread, with or without the GIL.
#pragma once

#include <memory>

#include "bindings.hpp"

namespace pydedup {

/// Deleter of memory that belongs to a Python object. It takes the GIL; after the interpreter is
/// gone it leaves the object alone, as its memory goes with the process.
struct ReleaseBytes {
    PyObject* object;

    void operator()(const std::byte*) const noexcept {
        if (Py_IsInitialized() == 0) return;
        const WithGil gil;
        Py_DECREF(object);
    }
};

/// The memory of `bytes`, kept alive by the result. Call with the GIL.
[[nodiscard]] inline std::shared_ptr<const std::byte> share_bytes(const py::bytes& bytes) {
    const auto* data = reinterpret_cast<const std::byte*>(PyBytes_AS_STRING(bytes.ptr()));
    return {data, ReleaseBytes{bytes.inc_ref().ptr()}};
}

/// The bytes object behind memory from share_bytes(), or nullptr for any other.
[[nodiscard]] inline PyObject* bytes_behind(
    const std::shared_ptr<const std::byte>& memory) noexcept {
    const ReleaseBytes* release = std::get_deleter<ReleaseBytes>(memory);
    return release == nullptr ? nullptr : release->object;
}

}  // namespace pydedup
