// SPDX-License-Identifier: Apache-2.0
// What the binding files share: their registrars and the ONE way to take arrays. Arrays are
// borrowed, never cast or copied: a wrong dtype or layout is a TypeError from pybind11 (noconvert)
// or an Error from here.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gil.hpp"
#include "pydedup/error.hpp"
#include "pydedup/types.hpp"

namespace pydedup {

namespace py = pybind11;

void bind_errors(py::module_& m);
void bind_cpu(py::module_& m);
void bind_hash(py::module_& m);
void bind_codec(py::module_& m);
void bind_pages(py::module_& m);
void bind_storage(py::module_& m);
void bind_packing(py::module_& m);
void bind_gemm(py::module_& m);
void bind_similarity(py::module_& m);
void bind_rows(py::module_& m);
void bind_conv(py::module_& m);

/// For functions that bypass pybind11: turns the exception being handled into a Python error, as
/// pybind11 would. Call inside a catch block, with the GIL; the caller returns nullptr.
void raise_in_python() noexcept;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

/// A borrowed 1-D array.
template <class T>
[[nodiscard]] std::span<const T> as_span(const Array<T>& array, const char* name) {
    if (array.ndim() != 1) {
        throw Error(ErrorCode::invalid_argument, std::string(name) + " must be a 1-D array");
    }
    return {array.data(), static_cast<std::size_t>(array.size())};
}

/// A copy of a 1-D array, made with the GIL. For numbers that the core checks and relies on from
/// then on: as soon as the GIL is given away, another thread may write into an array that is merely
/// borrowed.
template <class T>
[[nodiscard]] std::vector<T> as_copy(const Array<T>& array, const char* name) {
    const std::span<const T> values = as_span(array, name);
    return {values.begin(), values.end()};
}

/// Moves a vector into an array: no copy, freed with it.
template <class T>
[[nodiscard]] Array<T> as_array(std::vector<T>&& values) {
    auto* kept = new std::vector<T>(std::move(values));
    const py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return Array<T>(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

[[nodiscard]] inline Dtype as_dtype(int code) {
    const auto dtype = static_cast<Dtype>(code);
    if (code < 0 || code > 255 || item_bytes(dtype) == 0) {
        throw Error(ErrorCode::invalid_argument, "unknown dtype code " + std::to_string(code));
    }
    return dtype;
}

/// The bytes of a matrix: uint8 of shape (rows, cols * item size).
[[nodiscard]] inline MatrixRef as_matrix(const Array<std::uint8_t>& data, Dtype dtype) {
    const std::size_t item = item_bytes(dtype);
    if (data.ndim() != 2 || static_cast<std::size_t>(data.shape(1)) % item != 0) {
        throw Error(ErrorCode::invalid_argument,
                    "a matrix is passed as uint8 of shape (rows, cols * item size)");
    }
    const auto row_bytes = static_cast<std::size_t>(data.shape(1));
    return {reinterpret_cast<const std::byte*>(data.data()),
            static_cast<std::size_t>(data.shape(0)), row_bytes / item, row_bytes, dtype};
}

/// rows x cols, of something whose bytes can be counted.
[[nodiscard]] inline std::size_t count_elements(std::size_t rows, std::size_t cols,
                                                const char* name) {
    std::size_t elements = 0;
    if (__builtin_mul_overflow(rows, cols, &elements) || elements > PTRDIFF_MAX / 8) {
        throw Error(ErrorCode::invalid_argument, std::string(name) + " of " + std::to_string(rows) +
                                                     " x " + std::to_string(cols) +
                                                     " is too large");
    }
    return elements;
}

[[nodiscard]] inline BlockGrid as_grid(std::size_t rows, std::size_t cols, std::size_t block_rows,
                                       std::size_t block_cols) {
    if (block_rows == 0 || block_cols == 0) {
        throw Error(ErrorCode::invalid_argument, "a block shape must be at least (1, 1)");
    }
    static_cast<void>(count_elements(rows, cols, "a matrix"));
    // A block larger than its matrix is the matrix: nothing behind has to fear an overflow.
    return {rows, cols, std::min(block_rows, std::max<std::size_t>(rows, 1)),
            std::min(block_cols, std::max<std::size_t>(cols, 1))};
}

}  // namespace pydedup
