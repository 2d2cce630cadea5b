// SPDX-License-Identifier: Apache-2.0
// Streaming products over blocks on pinned pages.
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "block_window.hpp"
#include "blocks.hpp"
#include "pydedup/gemm.hpp"

namespace pydedup {
namespace {

void activate_array(const py::array& values, const std::string& activation, unsigned threads) {
    const Dtype dtype = py::isinstance<py::array_t<double>>(values) ? Dtype::f64 : Dtype::f32;
    const auto count = static_cast<std::size_t>(values.size());
    std::byte* const data = data_of(values, dtype, count, true, "values");
    const Activation chosen = as_activation(activation);
    const WithoutGil no_gil;
    activate(data, dtype, count, chosen, threads);
}

// A Matmul and the arrays it borrows.
class BoundMatmul {
  public:
    using Members = std::optional<Array<std::uint64_t>>;

    BoundMatmul(std::size_t rows, std::size_t cols, std::size_t block_rows, std::size_t block_cols,
                int dtype, py::array x, py::object bias, const std::string& activation,
                bool transpose, py::array y, unsigned threads,
                const std::optional<Array<std::uint8_t>>& variants,
                const std::optional<Array<std::uint32_t>>& places)
        : x_(std::move(x)), bias_(std::move(bias)), y_(std::move(y)), threads_(threads) {
        const BlockGrid grid = grid_of(rows, cols, block_rows, block_cols);
        const Dtype weights = as_dtype(dtype);
        const Dtype compute = compute_dtype(weights);
        if (x_.ndim() != 2) throw Error(ErrorCode::invalid_argument, "x must be a 2-D array");
        const auto m = static_cast<std::size_t>(x_.shape(0));
        const std::size_t in = transpose ? rows : cols;
        const std::size_t out = transpose ? cols : rows;
        if (variants) {
            variants_ = as_copy(*variants, "variants");
            const auto most = std::max_element(variants_.begin(), variants_.end());
            if (variants_.size() != m || (m != 0 && *most >= Matmul::kMaxVariants)) {
                throw Error(ErrorCode::invalid_argument, "variants must be " + std::to_string(m) +
                                                             " numbers below " +
                                                             std::to_string(Matmul::kMaxVariants));
            }
        }
        if (places) places_ = as_copy(*places, "places");
        const Matmul::Problem problem{
            grid,
            weights,
            data_of(x_, compute, m * in, false, "x"),
            m,
            bias_.is_none() ? nullptr : data_of(bias_, compute, out, false, "bias"),
            as_activation(activation),
            transpose,
            data_of(y_, compute, m * out, true, "y"),
            threads,
            variants ? variants_.data() : nullptr,
            places_};
        const WithoutGil no_gil;
        matmul_ = std::make_unique<Matmul>(problem);
    }

    void feed(const py::sequence& pages, const Array<std::uint32_t>& page_index,
              const Array<std::uint32_t>& slots, const py::object& bases, const Members& members) {
        const HeldBlocks held = hold_blocks(pages, page_index, slots, bases, threads_);
        const std::vector<std::uint64_t> who = as_members(members);
        const WithoutGil no_gil;
        feed_blocks(held.blocks(), who);
    }

    bool feed_resident(BufferPool& pool, BlockWindow& window, const Members& members) {
        const std::vector<std::uint64_t> who = as_members(members);
        return window.use(pool, threads_,
                          [&](std::span<const BlockView> blocks) { feed_blocks(blocks, who); });
    }

    [[nodiscard]] std::size_t fed() const noexcept { return matmul_->fed(); }

  private:
    void feed_blocks(std::span<const BlockView> blocks, std::span<const std::uint64_t> who) {
        const OnlyFeeder only(feeding_);
        matmul_->feed(blocks, who);
    }

    [[nodiscard]] static std::vector<std::uint64_t> as_members(const Members& members) {
        return members ? as_copy(*members, "members") : std::vector<std::uint64_t>();
    }

    py::array x_;
    py::object bias_;  // an array or None
    py::array y_;
    unsigned threads_;
    std::vector<std::uint8_t> variants_;
    std::vector<std::uint32_t> places_;
    std::unique_ptr<Matmul> matmul_;
    std::atomic_flag feeding_;
};

}  // namespace

void bind_gemm(py::module_& m) {
    m.def("compute_dtype",
          [](int dtype) { return static_cast<int>(compute_dtype(as_dtype(dtype))); });
    py::class_<BlockWindow>(m, "BlockWindow")
        .def(py::init<const Array<std::int64_t>&, const Array<std::uint32_t>&,
                      const Array<std::uint32_t>&, const py::object&>(),
             py::arg("page_ids").noconvert(), py::arg("page_index").noconvert(),
             py::arg("slots").noconvert(), py::arg("bases") = py::none())
        .def_property_readonly("remembers", &BlockWindow::remembers);
    py::class_<BoundMatmul>(m, "Matmul")
        .def(py::init<std::size_t, std::size_t, std::size_t, std::size_t, int, py::array,
                      py::object, const std::string&, bool, py::array, unsigned,
                      const std::optional<Array<std::uint8_t>>&,
                      const std::optional<Array<std::uint32_t>>&>(),
             py::arg("rows"), py::arg("cols"), py::arg("block_rows"), py::arg("block_cols"),
             py::arg("dtype"), py::arg("x").noconvert(), py::arg("bias"), py::arg("activation"),
             py::arg("transpose"), py::arg("y").noconvert(), py::arg("threads") = 0,
             py::arg("variants") = py::none(), py::arg("places") = py::none())
        .def("feed", &BoundMatmul::feed, py::arg("pages"), py::arg("page_index").noconvert(),
             py::arg("slots").noconvert(), py::arg("bases") = py::none(),
             py::arg("members") = py::none())
        .def("feed_resident", &BoundMatmul::feed_resident, py::arg("pool"), py::arg("window"),
             py::arg("members") = py::none())
        .def_property_readonly("fed", &BoundMatmul::fed);
    m.def("activate", &activate_array, py::arg("values").noconvert(), py::arg("activation"),
          py::arg("threads") = 0);
}

}  // namespace pydedup
