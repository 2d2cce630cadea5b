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
        const BlockGrid grid = as_grid(rows, cols, block_rows, block_cols);
        const Dtype weights = as_dtype(dtype);
        const Dtype compute = compute_dtype(weights);
        const bool x_is_bf16 = is_bf16_for(compute, x_);
        const bool y_is_bf16 = is_bf16_for(compute, y_);
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
            data_of(x_, x_is_bf16 ? Dtype::bf16 : compute, count_elements(m, in, "x"), false, "x"),
            m,
            bias_.is_none() ? nullptr : data_of(bias_, compute, out, false, "bias"),
            as_activation(activation),
            transpose,
            data_of(y_, y_is_bf16 ? Dtype::bf16 : compute, count_elements(m, out, "y"), true, "y"),
            threads,
            variants ? variants_.data() : nullptr,
            places_,
            x_is_bf16,
            y_is_bf16};
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

// Products one after the other, each with what the one before gives, for as long as all of their
// pages are in the pool: between them there is no Python, which takes ten times as long as a small
// product.
class BoundStack {
  public:
    BoundStack(const py::sequence& layers, const Array<std::int64_t>& page_ids)
        : page_ids_(as_copy(page_ids, "page_ids")) {
        if (layers.size() == 0) throw Error(ErrorCode::invalid_argument, "there are no layers");
        for (const py::object item : layers) {
            const auto parts = py::cast<py::tuple>(item);
            if (parts.size() != 9) {
                throw Error(ErrorCode::invalid_argument, "a layer must have 9 parts");
            }
            const auto number = [&](std::size_t i) { return py::cast<std::size_t>(parts[i]); };
            auto windows = py::cast<std::vector<std::shared_ptr<BlockWindow>>>(parts[8]);
            if (std::find(windows.begin(), windows.end(), nullptr) != windows.end()) {
                throw Error(ErrorCode::invalid_argument, "a window is None");
            }
            layers_.push_back({number(0), number(1), number(2), number(3), py::cast<int>(parts[4]),
                               parts[5], py::cast<std::string>(parts[6]), py::cast<bool>(parts[7]),
                               std::move(windows)});
        }
    }

    // What the last product gives, as the bits of bf16 numbers if so wanted; None when a page is
    // not there.
    [[nodiscard]] py::object run(BufferPool& pool, py::array x, unsigned threads,
                                 bool as_bf16) const {
        if (pool.count_resident(page_ids_) < page_ids_.size()) return py::none();
        for (const Layer& layer : layers_) {
            const bool is_last = &layer == &layers_.back();
            if (x.ndim() != 2) throw Error(ErrorCode::invalid_argument, "x must be a 2-D array");
            const bool is_wide = compute_dtype(as_dtype(layer.dtype)) == Dtype::f64;
            const std::vector<py::ssize_t> shape{
                x.shape(0), static_cast<py::ssize_t>(layer.transpose ? layer.cols : layer.rows)};
            py::array y(as_bf16 && is_last ? py::dtype::of<std::uint16_t>()
                        : is_wide          ? py::dtype::of<double>()
                                           : py::dtype::of<float>(),
                        shape);
            BoundMatmul product(layer.rows, layer.cols, layer.block_rows, layer.block_cols,
                                layer.dtype, std::move(x), layer.bias, layer.activation,
                                layer.transpose, y, threads, std::nullopt, std::nullopt);
            for (const std::shared_ptr<BlockWindow>& window : layer.windows) {
                if (!product.feed_resident(pool, *window, std::nullopt)) return py::none();
            }
            const BlockGrid grid =
                as_grid(layer.rows, layer.cols, layer.block_rows, layer.block_cols);
            if (product.fed() != grid.count()) {
                throw Error(ErrorCode::invalid_argument,
                            "the windows of a layer miss blocks of it");
            }
            x = std::move(y);
        }
        return std::move(x);
    }

  private:
    struct Layer {
        std::size_t rows, cols, block_rows, block_cols;
        int dtype;
        py::object bias;  // an array or None
        std::string activation;
        bool transpose;
        std::vector<std::shared_ptr<BlockWindow>> windows;
    };

    std::vector<std::int64_t> page_ids_;
    std::vector<Layer> layers_;
};

}  // namespace

void bind_gemm(py::module_& m) {
    m.def("compute_dtype",
          [](int dtype) { return static_cast<int>(compute_dtype(as_dtype(dtype))); });
    py::class_<BlockWindow, std::shared_ptr<BlockWindow>>(m, "BlockWindow")
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
    py::class_<BoundStack>(m, "Stack")
        .def(py::init<const py::sequence&, const Array<std::int64_t>&>(), py::arg("layers"),
             py::arg("page_ids").noconvert())
        .def("run", &BoundStack::run, py::arg("pool"), py::arg("x").noconvert(),
             py::arg("threads") = 0, py::arg("as_bf16") = false);
    m.def("activate", &activate_array, py::arg("values").noconvert(), py::arg("activation"),
          py::arg("threads") = 0);
}

}  // namespace pydedup
