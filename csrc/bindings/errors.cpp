// SPDX-License-Identifier: Apache-2.0
// pydedup::Error -> pydedup.errors, once. std::bad_alloc stays MemoryError (pybind11 does that).
#include "bindings.hpp"

namespace pydedup {
namespace {

const char* class_of(ErrorCode code) noexcept {
    switch (code) {
        case ErrorCode::invalid_argument:
            return "ArgumentError";
        case ErrorCode::corrupt_page:
            return "CorruptStoreError";
        case ErrorCode::unsupported_format:
            return "SchemaVersionError";
        case ErrorCode::out_of_budget:
            return "BudgetError";
        case ErrorCode::kernel_unavailable:
            return "KernelUnavailableError";
    }
    return "PydedupError";
}

void set_error(const Error& error) {
    const py::object type = py::module_::import("pydedup.errors").attr(class_of(error.code()));
    py::set_error(type, error.what());
}

}  // namespace

void raise_in_python() noexcept {
    try {
        try {
            throw;
        } catch (const Error& error) {
            set_error(error);
        }
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (...) {
        PyErr_SetString(PyExc_RuntimeError, "unknown exception of the native core");
    }
}

void bind_errors(py::module_&) {
    py::register_exception_translator([](std::exception_ptr pending) {
        try {
            if (pending) std::rethrow_exception(pending);
        } catch (const Error& error) {
            set_error(error);
        }
    });
}

}  // namespace pydedup
