// SPDX-License-Identifier: Apache-2.0
// hash_buffer is called for single small pieces, where pybind11's dispatch would cost more than the
// hash (200 ns against 20): it is a plain vectorcall function of the C API.
#include <cstring>

#include "bindings.hpp"
#include "pydedup/hash.hpp"

namespace pydedup {
namespace {

// Below this the GIL is kept: the hash takes less than 20 us, giving the GIL up and fighting for it
// may take longer.
constexpr std::size_t kReleaseGilBytes = std::size_t{256} << 10;

// A buffer that is given back at the end of the scope.
class BufferView {
  public:
    explicit BufferView(PyObject* object) {
        held_ = PyObject_GetBuffer(object, &view_, PyBUF_SIMPLE) == 0;
    }
    ~BufferView() {
        if (held_) PyBuffer_Release(&view_);
    }
    BufferView(const BufferView&) = delete;
    BufferView& operator=(const BufferView&) = delete;

    [[nodiscard]] bool held() const noexcept { return held_; }
    [[nodiscard]] Bytes bytes() const noexcept {
        return {static_cast<const std::byte*>(view_.buf), static_cast<std::size_t>(view_.len)};
    }

  private:
    Py_buffer view_;
    bool held_;
};

[[noreturn]] void refuse(const std::string& message) {
    throw Error(ErrorCode::invalid_argument, "hash_buffer: " + message);
}

std::string type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

std::uint64_t as_seed(PyObject* object) {
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(object));
    if (!number) {
        if (PyErr_ExceptionMatches(PyExc_TypeError) == 0) throw py::error_already_set();
        PyErr_Clear();
        refuse("seed must be an integer, got " + type_name(object));
    }
    const unsigned long long seed = PyLong_AsUnsignedLongLong(number.ptr());
    if (seed == static_cast<unsigned long long>(-1) && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        refuse("seed must be from 0 to 2**64 - 1");
    }
    return seed;
}

Digest digest_of(Bytes bytes, std::uint64_t seed) {
    if (bytes.size() < kReleaseGilBytes) return hash_bytes(bytes, seed);
    const WithoutGil no_gil;
    return hash_bytes(bytes, seed);
}

Digest hash_object(PyObject* object, std::uint64_t seed) {
    if (PyBytes_CheckExact(object) != 0) {
        return digest_of({reinterpret_cast<const std::byte*>(PyBytes_AS_STRING(object)),
                          static_cast<std::size_t>(PyBytes_GET_SIZE(object))},
                         seed);
    }
    const BufferView view(object);
    if (!view.held()) {
        PyErr_Clear();
        refuse(
            "buffer must be contiguous bytes (bytes, bytearray, memoryview, C-contiguous array), "
            "got " +
            type_name(object));
    }
    return digest_of(view.bytes(), seed);
}

// The arguments, as the vectorcall protocol gives them: `count` positional ones, then the values of
// `names`.
Digest hash_arguments(PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
    if (count != 1) {
        refuse("takes 1 positional argument, the buffer, but " + std::to_string(count) +
               " were given; seed is passed by name");
    }
    std::uint64_t seed = 0;
    const Py_ssize_t n_names = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
    for (Py_ssize_t i = 0; i < n_names; ++i) {
        PyObject* name = PyTuple_GET_ITEM(names, i);
        if (PyUnicode_CompareWithASCIIString(name, "seed") != 0) {
            refuse("unknown argument '" + py::cast<std::string>(py::handle(name)) + "'");
        }
        seed = as_seed(arguments[count + i]);
    }
    return hash_object(arguments[0], seed);
}

PyObject* hash_buffer(PyObject*, PyObject* const* arguments, Py_ssize_t count,
                      PyObject* names) noexcept {
    try {
        const Digest digest = hash_arguments(arguments, count, names);
        return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&digest), sizeof digest);
    } catch (...) {
        raise_in_python();
        return nullptr;
    }
}

constexpr const char* kHashBufferDoc =
    R"(hash_buffer($module, buffer, /, *, seed=0)
--

Return the 16-byte digest of contiguous bytes, little-endian.

Parameters
----------
buffer
    bytes, bytearray, memoryview or any other C-contiguous buffer. It must not change meanwhile.
seed
    0 to 2**64 - 1. Digests of different seeds are unrelated.

Raises
------
ArgumentError
    When the buffer is none or not contiguous, or the seed out of range.)";

PyMethodDef methods[] = {
    {"hash_buffer",
     // The cast that the C API asks for: METH_FASTCALL functions are stored as PyCFunction.
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(hash_buffer)),
     METH_FASTCALL | METH_KEYWORDS, kHashBufferDoc},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_hash(py::module_& m) {
    m.def(
        "hash_blocks",
        [](const Array<std::uint8_t>& data, int dtype, std::size_t block_rows,
           std::size_t block_cols, std::uint64_t seed, unsigned threads) {
            const MatrixRef matrix = as_matrix(data, as_dtype(dtype));
            const BlockGrid grid = as_grid(matrix.rows, matrix.cols, block_rows, block_cols);
            py::array_t<std::uint64_t> digests({grid.count(), std::size_t{2}});
            std::span<Digest> out(reinterpret_cast<Digest*>(digests.mutable_data()), grid.count());
            {
                const WithoutGil no_gil;
                hash_blocks(matrix, grid, seed, out, threads);
            }
            return digests;
        },
        py::arg("data").noconvert(), py::arg("dtype"), py::arg("block_rows"), py::arg("block_cols"),
        py::arg("seed") = 0, py::arg("threads") = 0);
    if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace pydedup
