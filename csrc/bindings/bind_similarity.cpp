// SPDX-License-Identifier: Apache-2.0
// The similarity index, exact distances and magnitudes. Blocks come as numpy arrays of any strides
// whose innermost axis is dense, and are never copied.
#include <memory>
#include <string>
#include <utility>

#include "bindings.hpp"
#include "pydedup/similarity.hpp"
#include "python_bytes.hpp"

namespace pydedup {
namespace {

[[noreturn]] void refuse(const std::string& message) {
    throw Error(ErrorCode::invalid_argument, message);
}

std::size_t step_of(const py::array& array, py::ssize_t axis, const char* name) {
    if (array.size() == 0) return 0;  // its strides say nothing
    if (array.shape(axis) > 1 && array.strides(axis) < 0) {
        refuse(std::string(name) + " has a negative stride; pass numpy.ascontiguousarray of it");
    }
    return array.shape(axis) > 1 ? static_cast<std::size_t>(array.strides(axis)) : 0;
}

void check_items(const py::array& array, std::size_t item, const char* name) {
    if (static_cast<std::size_t>(array.itemsize()) != item) {
        refuse(std::string(name) + " has elements of " + std::to_string(array.itemsize()) +
               " bytes instead of " + std::to_string(item));
    }
    const py::ssize_t last = array.ndim() - 1;
    if (array.size() != 0 && array.shape(last) > 1 &&
        static_cast<std::size_t>(array.strides(last)) != item) {
        refuse(std::string(name) +
               " is not dense in its last axis; pass numpy.ascontiguousarray of it");
    }
}

// Of shape (n, rows, cols) or (n, rows * cols).
BlockBatch as_batch(const py::array& array, Dtype dtype, std::size_t rows, std::size_t cols,
                    const char* name) {
    const auto n_of = [&](py::ssize_t axis) { return static_cast<std::size_t>(array.shape(axis)); };
    const auto* data = static_cast<const std::byte*>(array.data());
    const std::size_t count = array.ndim() == 0 ? 0 : n_of(0);
    BlockBatch batch = dense_blocks(data, count, rows, cols, dtype);
    const bool flat = array.ndim() == 2 && n_of(1) == rows * cols;
    const bool cut = array.ndim() == 3 && n_of(1) == rows && n_of(2) == cols;
    if (!flat && !cut) {
        refuse(std::string(name) + " must have the shape (n, " + std::to_string(rows) + ", " +
               std::to_string(cols) + ") or (n, " + std::to_string(rows * cols) + ")");
    }
    check_items(array, item_bytes(dtype), name);
    if (cut && rows > 1) batch.row_stride = step_of(array, 1, name);
    batch.block_pitch = step_of(array, 0, name);
    return batch;
}

// The whole blocks of a matrix.
BlockBatch as_whole_blocks(const py::array& array, Dtype dtype, std::size_t rows, std::size_t cols,
                           const char* name) {
    if (array.ndim() != 2) refuse(std::string(name) + " must be a 2-D array");
    check_items(array, item_bytes(dtype), name);
    const MatrixRef matrix{
        static_cast<const std::byte*>(array.data()), static_cast<std::size_t>(array.shape(0)),
        static_cast<std::size_t>(array.shape(1)), step_of(array, 0, name), dtype};
    return whole_blocks(matrix, rows, cols);
}

// A batch of blocks or, with `whole`, those of a matrix.
BlockBatch as_blocks(const py::array& array, Dtype dtype, std::size_t rows, std::size_t cols,
                     bool whole, const char* name) {
    return whole ? as_whole_blocks(array, dtype, rows, cols, name)
                 : as_batch(array, dtype, rows, cols, name);
}

std::unique_ptr<L2Index> make_index(int dtype, std::size_t rows, std::size_t cols, double r,
                                    std::size_t bands, std::size_t band_rows, std::uint64_t seed) {
    return std::make_unique<L2Index>(
        LshParameters{as_dtype(dtype), rows, cols, r, bands, band_rows, seed});
}

BlockBatch blocks_for(const L2Index& index, const py::array& array, bool whole) {
    const LshParameters& p = index.parameters();
    return as_blocks(array, p.dtype, p.rows, p.cols, whole, whole ? "matrix" : "blocks");
}

void add_blocks(L2Index& index, const py::array& blocks, const Array<std::int64_t>& ids, bool whole,
                unsigned threads) {
    const BlockBatch batch = blocks_for(index, blocks, whole);
    const std::vector<std::int64_t> new_ids = as_copy(ids, "ids");
    const WithoutGil no_gil;
    index.add(batch, new_ids, threads);
}

std::unique_ptr<L2Index> select_ids(const L2Index& index, const Array<std::int64_t>& ids,
                                    const Array<std::int64_t>& new_ids) {
    const std::vector<std::int64_t> from = as_copy(ids, "ids");
    const std::vector<std::int64_t> to = as_copy(new_ids, "new_ids");
    const WithoutGil no_gil;
    return index.select(from, to);
}

void remove_ids(L2Index& index, const Array<std::int64_t>& ids) {
    const std::vector<std::int64_t> old_ids = as_copy(ids, "ids");
    const WithoutGil no_gil;
    index.remove(old_ids);
}

py::tuple query_blocks(const L2Index& index, const py::array& blocks, std::size_t k, bool whole,
                       unsigned threads) {
    const BlockBatch batch = blocks_for(index, blocks, whole);
    py::array_t<std::int64_t> ids({batch.count, k});
    py::array_t<double> distances({batch.count, k});
    const std::span out_ids(ids.mutable_data(), batch.count * k);
    const std::span out_distances(distances.mutable_data(), batch.count * k);
    {
        const WithoutGil no_gil;
        index.query(batch, k, out_ids, out_distances, threads);
    }
    return py::make_tuple(ids, distances);
}

py::array_t<std::int32_t> hash_blocks_of(const L2Index& index, const py::array& blocks, bool whole,
                                         unsigned threads) {
    const BlockBatch batch = blocks_for(index, blocks, whole);
    const LshParameters& p = index.parameters();
    py::array_t<std::int32_t> hashes({batch.count, p.bands, p.band_rows});
    const std::span out(hashes.mutable_data(), static_cast<std::size_t>(hashes.size()));
    {
        const WithoutGil no_gil;
        index.hashes(batch, out, threads);
    }
    return hashes;
}

py::bytes save_index(const L2Index& index) {
    std::vector<std::byte> bytes;
    {
        const WithoutGil no_gil;
        bytes = index.save();
    }
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::unique_ptr<L2Index> load_index(const py::bytes& payload, unsigned threads) {
    const std::shared_ptr<const std::byte> memory = share_bytes(payload);
    const Bytes bytes(memory.get(), static_cast<std::size_t>(PyBytes_GET_SIZE(payload.ptr())));
    const WithoutGil no_gil;
    return L2Index::load(bytes, threads);
}

Array<std::int64_t> ids_of(const L2Index& index) {
    std::vector<std::int64_t> ids;
    {
        const WithoutGil no_gil;
        ids = index.ids();
    }
    return as_array(std::move(ids));
}

py::array_t<double> compare(const py::array& a, const py::array& b, int dtype, std::size_t rows,
                            std::size_t cols, const Array<std::int64_t>& left,
                            const Array<std::int64_t>& right, double eps, double limit,
                            unsigned threads) {
    const BlockBatch from = as_batch(a, as_dtype(dtype), rows, cols, "a");
    const BlockBatch to = as_batch(b, as_dtype(dtype), rows, cols, "b");
    const std::vector<std::int64_t> lefts = as_copy(left, "left");
    const std::vector<std::int64_t> rights = as_copy(right, "right");
    static_assert(sizeof(Distance) == 3 * sizeof(double));
    py::array_t<double> out({lefts.size(), std::size_t{3}});
    const std::span distances(reinterpret_cast<Distance*>(out.mutable_data()), lefts.size());
    {
        const WithoutGil no_gil;
        compare_blocks(from, to, lefts, rights, eps, limit, distances, threads);
    }
    return out;
}

py::array_t<double> magnitudes(const py::array& blocks, int dtype, std::size_t rows,
                               std::size_t cols, bool whole, unsigned threads) {
    const BlockBatch batch = as_blocks(blocks, as_dtype(dtype), rows, cols, whole, "blocks");
    py::array_t<double> out(static_cast<py::ssize_t>(batch.count));
    const std::span values(out.mutable_data(), batch.count);
    {
        const WithoutGil no_gil;
        block_magnitudes(batch, values, threads);
    }
    return out;
}

}  // namespace

void bind_similarity(py::module_& m) {
    // Whatever takes the lock of the index may wait as long as an add takes.
    const py::call_guard<WithoutGil> without_gil;
    py::class_<L2Index>(m, "L2Index")
        .def(py::init(&make_index), py::arg("dtype"), py::arg("rows"), py::arg("cols"),
             py::arg("r"), py::arg("bands"), py::arg("band_rows"), py::arg("seed"))
        .def("add", &add_blocks, py::arg("blocks"), py::arg("ids").noconvert(), py::arg("whole"),
             py::arg("threads") = 0)
        .def("remove", &remove_ids, py::arg("ids").noconvert())
        .def("query", &query_blocks, py::arg("blocks"), py::arg("k"), py::arg("whole"),
             py::arg("threads") = 0)
        .def("hashes", &hash_blocks_of, py::arg("blocks"), py::arg("whole"), py::arg("threads") = 0)
        .def("merge", &L2Index::merge, py::arg("other"), py::arg("threads") = 0, without_gil)
        .def("select", &select_ids, py::arg("ids"), py::arg("new_ids"))
        .def("contains", &L2Index::contains, py::arg("id"), without_gil)
        .def("ids", &ids_of)
        .def("save", &save_index)
        .def_static("load", &load_index, py::arg("payload"), py::arg("threads") = 0)
        .def_property_readonly("size", py::cpp_function(&L2Index::size, without_gil))
        .def_property_readonly("memory_bytes",
                               py::cpp_function(&L2Index::memory_bytes, without_gil))
        .def_property_readonly("parameters", [](const L2Index& index) {
            const LshParameters& p = index.parameters();
            return py::make_tuple(static_cast<int>(p.dtype), p.rows, p.cols, p.r, p.bands,
                                  p.band_rows, p.seed);
        });
    m.def("compare_blocks", &compare, py::arg("a"), py::arg("b"), py::arg("dtype"), py::arg("rows"),
          py::arg("cols"), py::arg("left").noconvert(), py::arg("right").noconvert(),
          py::arg("eps"), py::arg("limit"), py::arg("threads") = 0);
    m.def("block_magnitudes", &magnitudes, py::arg("blocks"), py::arg("dtype"), py::arg("rows"),
          py::arg("cols"), py::arg("whole"), py::arg("threads") = 0);
}

}  // namespace pydedup
