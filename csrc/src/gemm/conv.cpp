// SPDX-License-Identifier: Apache-2.0
#include "pydedup/conv.hpp"

#include <string>

#include "gemm/conv_impl.hpp"
#include "gemm/useful_threads.hpp"
#include "gemm/weights.hpp"
#include "pydedup/error.hpp"

namespace pydedup {

void Conv2d::Impl::feed(std::span<const BlockView> blocks) {
    if (blocks.size() > p_.grid.count() - fed_) {
        throw Error(ErrorCode::invalid_argument, std::to_string(fed_ + blocks.size()) +
                                                     " blocks were fed to a matrix of " +
                                                     std::to_string(p_.grid.count()));
    }
    for (std::size_t i = 0; i < blocks.size(); ++i) {
        detail::check_block(blocks[i], p_.grid, p_.weights, fed_ + i);
    }
    if (!blocks.empty() && p_.shape.batch != 0) convolve(blocks);
    fed_ += blocks.size();
}

auto Conv2d::Impl::work_of(std::span<const BlockView> blocks) const noexcept -> Work {
    const std::size_t columns = p_.grid.grid_cols();
    const std::size_t first = fed_ / columns;
    std::size_t weights = 0;
    for (const BlockView& block : blocks) weights += std::size_t{block.rows} * block.cols;
    const std::size_t positions = p_.shape.batch * p_.shape.out_h() * p_.shape.out_w();
    return {first, (fed_ + blocks.size() - 1) / columns - first + 1, weights,
            detail::useful_threads(p_.threads,
                                   static_cast<double>(weights) * static_cast<double>(positions))};
}

Conv2d::Conv2d(const Problem& problem) {
    check_shape(problem.shape);
    const ConvShape& s = problem.shape;
    const std::size_t cols = s.channels / s.groups * s.kernel_h * s.kernel_w;
    if (problem.grid.rows != s.out_channels || problem.grid.cols != cols) {
        throw Error(ErrorCode::invalid_argument,
                    "the weight is a matrix of " + std::to_string(problem.grid.rows) + " x " +
                        std::to_string(problem.grid.cols) + " where the shape needs " +
                        std::to_string(s.out_channels) + " x " + std::to_string(cols));
    }
    impl_ = Impl::direct(problem);
    if (impl_ == nullptr) impl_ = Impl::tiled(problem);
}

Conv2d::~Conv2d() = default;
Conv2d::Conv2d(Conv2d&&) noexcept = default;
Conv2d& Conv2d::operator=(Conv2d&&) noexcept = default;

void Conv2d::feed(std::span<const BlockView> blocks) { impl_->feed(blocks); }

std::size_t Conv2d::fed() const noexcept { return impl_->fed(); }

}  // namespace pydedup
