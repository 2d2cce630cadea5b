// SPDX-License-Identifier: Apache-2.0
// Streaming convolutions over blocks on pinned pages.
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <memory>
#include <string>

#include "bindings.hpp"
#include "block_window.hpp"
#include "blocks.hpp"
#include "pydedup/conv.hpp"

namespace pydedup {
namespace {

// A Conv2d and the arrays it borrows.
class BoundConv2d {
  public:
    BoundConv2d(std::size_t rows, std::size_t cols, std::size_t block_rows, std::size_t block_cols,
                int dtype, py::array x, py::object bias, const std::string& activation, py::array y,
                const std::array<std::size_t, 2>& kernel, const std::array<std::size_t, 2>& stride,
                const std::array<std::size_t, 4>& padding,
                const std::array<std::size_t, 2>& dilation, std::size_t groups, unsigned threads)
        : x_(std::move(x)), bias_(std::move(bias)), y_(std::move(y)), threads_(threads) {
        if (x_.ndim() != 4) {
            throw Error(ErrorCode::invalid_argument,
                        "x must have the axes batch, channels, height, width");
        }
        const auto axis = [this](int i) { return static_cast<std::size_t>(x_.shape(i)); };
        const ConvShape shape{axis(0),    axis(1),     axis(2),     axis(3),
                              rows,       kernel[0],   kernel[1],   stride[0],
                              stride[1],  dilation[0], dilation[1], padding[0],
                              padding[1], padding[2],  padding[3],  groups};
        check_shape(shape);  // before sizes are computed from it
        const Dtype weights = as_dtype(dtype);
        const Dtype compute = compute_dtype(weights);
        const bool x_is_bf16 = is_bf16_for(compute, x_);
        const bool y_is_bf16 = is_bf16_for(compute, y_);
        const std::size_t x_size = shape.batch * shape.channels * shape.height * shape.width;
        const std::size_t y_size = shape.batch * shape.out_channels * shape.out_h() * shape.out_w();
        const Conv2d::Problem problem{
            as_grid(rows, cols, block_rows, block_cols),
            weights,
            shape,
            data_of(x_, x_is_bf16 ? Dtype::bf16 : compute, x_size, false, "x"),
            bias_.is_none() ? nullptr : data_of(bias_, compute, rows, false, "bias"),
            as_activation(activation),
            data_of(y_, y_is_bf16 ? Dtype::bf16 : compute, y_size, true, "y"),
            threads,
            x_is_bf16,
            y_is_bf16};
        const WithoutGil no_gil;  // it looks through all of x
        conv_ = std::make_unique<Conv2d>(problem);
    }

    void feed(const py::sequence& pages, const Array<std::uint32_t>& page_index,
              const Array<std::uint32_t>& slots, const py::object& bases) {
        const HeldBlocks held = hold_blocks(pages, page_index, slots, bases, threads_);
        const WithoutGil no_gil;
        feed_blocks(held.blocks());
    }

    bool feed_resident(BufferPool& pool, BlockWindow& window) {
        return window.use(pool, threads_,
                          [this](std::span<const BlockView> blocks) { feed_blocks(blocks); });
    }

    [[nodiscard]] std::size_t fed() const noexcept { return conv_->fed(); }

  private:
    void feed_blocks(std::span<const BlockView> blocks) {
        const OnlyFeeder only(feeding_);
        conv_->feed(blocks);
    }

    py::array x_;
    py::object bias_;  // an array or None
    py::array y_;
    unsigned threads_;
    std::unique_ptr<Conv2d> conv_;
    std::atomic_flag feeding_;
};

}  // namespace

void bind_conv(py::module_& m) {
    py::class_<BoundConv2d>(m, "Conv2d")
        .def(py::init<std::size_t, std::size_t, std::size_t, std::size_t, int, py::array,
                      py::object, const std::string&, py::array, const std::array<std::size_t, 2>&,
                      const std::array<std::size_t, 2>&, const std::array<std::size_t, 4>&,
                      const std::array<std::size_t, 2>&, std::size_t, unsigned>(),
             py::arg("rows"), py::arg("cols"), py::arg("block_rows"), py::arg("block_cols"),
             py::arg("dtype"), py::arg("x").noconvert(), py::arg("bias"), py::arg("activation"),
             py::arg("y").noconvert(), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
             py::arg("dilation"), py::arg("groups"), py::arg("threads") = 0)
        .def("feed", &BoundConv2d::feed, py::arg("pages"), py::arg("page_index").noconvert(),
             py::arg("slots").noconvert(), py::arg("bases") = py::none())
        .def("feed_resident", &BoundConv2d::feed_resident, py::arg("pool"), py::arg("window"))
        .def_property_readonly("fed", &BoundConv2d::fed);
}

}  // namespace pydedup
