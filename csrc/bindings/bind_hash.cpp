// SPDX-License-Identifier: Apache-2.0
#include "bindings.hpp"
#include "pydedup/hash.hpp"

namespace pydedup {

void bind_hash(py::module_& m) {
    m.def(
        "hash_blocks",
        [](const Array<std::uint8_t>& data, int dtype, std::size_t block_rows,
           std::size_t block_cols, std::uint64_t seed, unsigned threads) {
            const MatrixRef matrix = as_matrix(data, as_dtype(dtype));
            const BlockGrid grid = as_grid(matrix, block_rows, block_cols);
            py::array_t<std::uint64_t> digests({grid.count(), std::size_t{2}});
            std::span<Digest> out(reinterpret_cast<Digest*>(digests.mutable_data()), grid.count());
            {
                const py::gil_scoped_release release;
                hash_blocks(matrix, grid, seed, out, threads);
            }
            return digests;
        },
        py::arg("data").noconvert(), py::arg("dtype"), py::arg("block_rows"), py::arg("block_cols"),
        py::arg("seed") = 0, py::arg("threads") = 0);
    m.def(
        "hash_bytes",
        [](const py::buffer& buffer, std::uint64_t seed) {
            const py::buffer_info info = buffer.request();
            if (info.ndim != 1 || (info.shape[0] > 1 && info.strides[0] != info.itemsize)) {
                throw Error(ErrorCode::invalid_argument, "hash_bytes takes contiguous bytes");
            }
            const Bytes bytes(static_cast<const std::byte*>(info.ptr),
                              static_cast<std::size_t>(info.size * info.itemsize));
            Digest digest{};
            {
                const py::gil_scoped_release release;
                digest = hash_bytes(bytes, seed);
            }
            return py::bytes(reinterpret_cast<const char*>(&digest), sizeof digest);
        },
        py::arg("buffer"), py::arg("seed") = 0);
}

}  // namespace pydedup
