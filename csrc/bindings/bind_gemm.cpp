// SPDX-License-Identifier: Apache-2.0
// Streaming products, row gather and bags over blocks on pinned pages.
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "pydedup/gemm.hpp"
#include "pydedup/page_format.hpp"

namespace pydedup {
namespace {

// Blocks on pages; keeps the pages alive.
struct HeldBlocks {
    std::vector<std::shared_ptr<Page>> pages;
    std::vector<BlockView> blocks;
};

HeldBlocks hold_blocks(const py::sequence& pages, const Array<std::uint32_t>& page_index,
                       const Array<std::uint32_t>& slots) {
    const auto page_of = as_span(page_index, "page_index");
    const auto slot_of = as_span(slots, "slots");
    if (page_of.size() != slot_of.size()) {
        throw Error(ErrorCode::invalid_argument, "page_index and slots differ in length");
    }
    HeldBlocks held;
    held.pages.reserve(pages.size());
    for (const py::handle page : pages) {
        if (page.is_none()) throw Error(ErrorCode::invalid_argument, "pages holds a None");
        held.pages.push_back(py::cast<std::shared_ptr<Page>>(page));
    }
    held.blocks.reserve(page_of.size());
    for (std::size_t i = 0; i < page_of.size(); ++i) {
        if (page_of[i] >= held.pages.size()) {
            throw Error(ErrorCode::invalid_argument,
                        "page_index " + std::to_string(page_of[i]) + " is outside of " +
                            std::to_string(held.pages.size()) + " pages");
        }
        held.blocks.push_back(held.pages[page_of[i]]->block(slot_of[i]));
    }
    return held;
}

// A C-contiguous array of the compute dtype, borrowed.
std::byte* data_of(const py::object& object, Dtype compute, std::size_t size, bool writes,
                   const char* name) {
    const bool wide = compute == Dtype::f64;
    const bool same = wide ? py::isinstance<py::array_t<double>>(object)
                           : py::isinstance<py::array_t<float>>(object);
    const auto array = same ? py::reinterpret_borrow<py::array>(object) : py::array();
    const bool contiguous = (array.flags() & py::array::c_style) != 0;
    if (!same || !contiguous || static_cast<std::size_t>(array.size()) != size) {
        throw Error(ErrorCode::invalid_argument, std::string(name) + " must be a C-contiguous " +
                                                     (wide ? "float64" : "float32") + " array of " +
                                                     std::to_string(size) + " elements");
    }
    if (writes && !array.writeable()) {
        throw Error(ErrorCode::invalid_argument, std::string(name) + " is read-only");
    }
    return static_cast<std::byte*>(const_cast<void*>(array.data()));
}

Activation as_activation(const std::string& name) {
    const std::optional<Activation> activation = activation_named(name);
    if (!activation) {
        throw Error(ErrorCode::invalid_argument, "unknown activation '" + name + "'");
    }
    return *activation;
}

void activate_array(const py::array& values, const std::string& activation, unsigned threads) {
    const Dtype dtype = py::isinstance<py::array_t<double>>(values) ? Dtype::f64 : Dtype::f32;
    const auto count = static_cast<std::size_t>(values.size());
    std::byte* const data = data_of(values, dtype, count, true, "values");
    const Activation chosen = as_activation(activation);
    const py::gil_scoped_release release;
    activate(data, dtype, count, chosen, threads);
}

BlockGrid grid_of(std::size_t rows, std::size_t cols, std::size_t block_rows,
                  std::size_t block_cols) {
    if (block_rows == 0 || block_cols == 0) {
        throw Error(ErrorCode::invalid_argument, "a block shape must be at least (1, 1)");
    }
    return {rows, cols, block_rows, block_cols};
}

// A Matmul and the arrays it borrows.
class BoundMatmul {
  public:
    BoundMatmul(std::size_t rows, std::size_t cols, std::size_t block_rows, std::size_t block_cols,
                int dtype, py::array x, py::object bias, const std::string& activation,
                bool transpose, py::array y, unsigned threads)
        : x_(std::move(x)), bias_(std::move(bias)), y_(std::move(y)) {
        const BlockGrid grid = grid_of(rows, cols, block_rows, block_cols);
        const Dtype weights = as_dtype(dtype);
        const Dtype compute = compute_dtype(weights);
        if (x_.ndim() != 2) throw Error(ErrorCode::invalid_argument, "x must be a 2-D array");
        const auto m = static_cast<std::size_t>(x_.shape(0));
        const std::size_t in = transpose ? rows : cols;
        const std::size_t out = transpose ? cols : rows;
        const Matmul::Problem problem{
            grid,
            weights,
            data_of(x_, compute, m * in, false, "x"),
            m,
            bias_.is_none() ? nullptr : data_of(bias_, compute, out, false, "bias"),
            as_activation(activation),
            transpose,
            data_of(y_, compute, m * out, true, "y"),
            threads};
        const py::gil_scoped_release release;
        matmul_ = std::make_unique<Matmul>(problem);
    }

    void feed(const py::sequence& pages, const Array<std::uint32_t>& page_index,
              const Array<std::uint32_t>& slots) {
        const HeldBlocks held = hold_blocks(pages, page_index, slots);
        const py::gil_scoped_release release;
        matmul_->feed(held.blocks);
    }

    [[nodiscard]] std::size_t fed() const noexcept { return matmul_->fed(); }

  private:
    py::array x_;
    py::object bias_;  // an array or None
    py::array y_;
    std::unique_ptr<Matmul> matmul_;
};

void take_rows_into(std::size_t rows, std::size_t cols, std::size_t block_rows,
                    std::size_t block_cols, int dtype, const Array<std::int64_t>& indices,
                    const py::sequence& pages, const Array<std::uint32_t>& page_index,
                    const Array<std::uint32_t>& slots, const Array<std::int64_t>& ids,
                    const Array<std::int64_t>& positions, Array<std::uint8_t> out,
                    unsigned threads) {
    const MatrixRef to = as_matrix(out, as_dtype(dtype));
    if (to.cols != cols) {
        throw Error(ErrorCode::invalid_argument, "out must have the width of the matrix");
    }
    const HeldBlocks held = hold_blocks(pages, page_index, slots);
    const BlockSet set{grid_of(rows, cols, block_rows, block_cols), as_dtype(dtype),
                       as_span(indices, "indices"), held.blocks};
    const auto wanted = as_span(ids, "ids");
    const auto places = as_span(positions, "positions");
    auto* const bytes = reinterpret_cast<std::byte*>(out.mutable_data());  // throws when read-only
    const py::gil_scoped_release release;
    take_rows(set, wanted, places, bytes, to.rows, threads);
}

void bag_rows_into(std::size_t rows, std::size_t cols, std::size_t block_rows,
                   std::size_t block_cols, int dtype, const Array<std::int64_t>& indices,
                   const py::sequence& pages, const Array<std::uint32_t>& page_index,
                   const Array<std::uint32_t>& slots, const Array<std::int64_t>& ids,
                   const Array<std::int64_t>& bags, const std::string& mode, const py::array& out,
                   unsigned threads) {
    if (out.ndim() != 2) throw Error(ErrorCode::invalid_argument, "out must be a 2-D array");
    if (mode != "sum" && mode != "max") {
        throw Error(ErrorCode::invalid_argument, "unknown bag mode '" + mode + "'");
    }
    const auto n_bags = static_cast<std::size_t>(out.shape(0));
    std::byte* const to = data_of(out, compute_dtype(as_dtype(dtype)), n_bags * cols, true, "out");
    const HeldBlocks held = hold_blocks(pages, page_index, slots);
    const BlockSet set{grid_of(rows, cols, block_rows, block_cols), as_dtype(dtype),
                       as_span(indices, "indices"), held.blocks};
    const auto wanted = as_span(ids, "ids");
    const auto bag_of = as_span(bags, "bags");
    const py::gil_scoped_release release;
    bag_rows(set, wanted, bag_of, mode == "sum" ? BagMode::sum : BagMode::max, to, n_bags, threads);
}

}  // namespace

void bind_gemm(py::module_& m) {
    m.def("compute_dtype",
          [](int dtype) { return static_cast<int>(compute_dtype(as_dtype(dtype))); });
    py::class_<BoundMatmul>(m, "Matmul")
        .def(py::init<std::size_t, std::size_t, std::size_t, std::size_t, int, py::array,
                      py::object, const std::string&, bool, py::array, unsigned>(),
             py::arg("rows"), py::arg("cols"), py::arg("block_rows"), py::arg("block_cols"),
             py::arg("dtype"), py::arg("x").noconvert(), py::arg("bias"), py::arg("activation"),
             py::arg("transpose"), py::arg("y").noconvert(), py::arg("threads") = 0)
        .def("feed", &BoundMatmul::feed, py::arg("pages"), py::arg("page_index").noconvert(),
             py::arg("slots").noconvert())
        .def_property_readonly("fed", &BoundMatmul::fed);
    m.def("activate", &activate_array, py::arg("values").noconvert(), py::arg("activation"),
          py::arg("threads") = 0);
    m.def("take_rows", &take_rows_into, py::arg("rows"), py::arg("cols"), py::arg("block_rows"),
          py::arg("block_cols"), py::arg("dtype"), py::arg("indices").noconvert(), py::arg("pages"),
          py::arg("page_index").noconvert(), py::arg("slots").noconvert(),
          py::arg("ids").noconvert(), py::arg("positions").noconvert(), py::arg("out").noconvert(),
          py::arg("threads") = 0);
    m.def("bag_rows", &bag_rows_into, py::arg("rows"), py::arg("cols"), py::arg("block_rows"),
          py::arg("block_cols"), py::arg("dtype"), py::arg("indices").noconvert(), py::arg("pages"),
          py::arg("page_index").noconvert(), py::arg("slots").noconvert(),
          py::arg("ids").noconvert(), py::arg("bags").noconvert(), py::arg("mode"),
          py::arg("out").noconvert(), py::arg("threads") = 0);
}

}  // namespace pydedup
