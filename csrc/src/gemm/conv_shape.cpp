// SPDX-License-Identifier: Apache-2.0
// Shapes that a convolution refuses, so that none of its sizes or counts overflows.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

#include "pydedup/conv.hpp"
#include "pydedup/error.hpp"

namespace pydedup {
namespace {

struct Named {
    const char* name;
    std::size_t value;
};

void check_count(const char* what, std::initializer_list<std::size_t> factors) {
    std::size_t count = 8;  // bytes of the largest element
    for (const std::size_t factor : factors) {
        if (__builtin_mul_overflow(count, factor, &count)) {
            throw Error(ErrorCode::invalid_argument,
                        std::string("the ") + what + " has more elements than memory can hold");
        }
    }
}

void check_size(const Named& size, std::size_t least) {
    constexpr std::size_t kLargest = std::numeric_limits<std::int32_t>::max();
    if (size.value < least) {
        throw Error(ErrorCode::invalid_argument,
                    std::string(size.name) + " is " + std::to_string(size.value) +
                        "; it must be at least " + std::to_string(least));
    }
    if (size.value > kLargest) {
        throw Error(ErrorCode::invalid_argument, std::string(size.name) + " is " +
                                                     std::to_string(size.value) +
                                                     "; at most 2^31 - 1 is supported");
    }
}

void check_axis(const char* axis, std::size_t size, std::size_t before, std::size_t after,
                std::size_t kernel, std::size_t dilation) {
    const std::size_t reach = (kernel - 1) * dilation + 1;
    if (reach > size + before + after) {
        throw Error(ErrorCode::invalid_argument,
                    std::string("the kernel covers ") + std::to_string(reach) + " of the image's " +
                        axis + ", which is " + std::to_string(size + before + after) +
                        " with its padding");
    }
}

}  // namespace

void check_shape(const ConvShape& s) {
    for (const Named& size : {Named{"channels", s.channels},
                              {"out_channels", s.out_channels},
                              {"kernel_h", s.kernel_h},
                              {"kernel_w", s.kernel_w},
                              {"stride_h", s.stride_h},
                              {"stride_w", s.stride_w},
                              {"dilation_h", s.dilation_h},
                              {"dilation_w", s.dilation_w},
                              {"groups", s.groups}}) {
        check_size(size, 1);
    }
    for (const Named& size : {Named{"batch", s.batch},
                              {"height", s.height},
                              {"width", s.width},
                              {"padding", s.pad_top},
                              {"padding", s.pad_left},
                              {"padding", s.pad_bottom},
                              {"padding", s.pad_right}}) {
        check_size(size, 0);
    }
    if (s.channels % s.groups != 0 || s.out_channels % s.groups != 0) {
        throw Error(ErrorCode::invalid_argument,
                    std::to_string(s.groups) + " groups do not divide " +
                        std::to_string(s.channels) + " channels and " +
                        std::to_string(s.out_channels) + " output channels");
    }
    check_axis("height", s.height, s.pad_top, s.pad_bottom, s.kernel_h, s.dilation_h);
    check_axis("width", s.width, s.pad_left, s.pad_right, s.kernel_w, s.dilation_w);
    check_count("image", {s.batch, s.channels, s.height, s.width});
    check_count("weight", {s.out_channels, s.channels, s.kernel_h, s.kernel_w});
    check_count("result",
                {std::max<std::size_t>(s.batch, 1), s.out_channels, s.out_h(), s.out_w()});
}

}  // namespace pydedup
