// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "kernels/gemm_kernels.hpp"

namespace pydedup {

/// Whether both make the same products of bf16, and move, cut and round alike numbers that come out
/// of these 700 bytes. Private to dispatch/.
[[nodiscard]] bool same_bf16(const Bf16GemmKernels& bf16, const Bf16GemmKernels& reference,
                             std::span<const std::uint8_t> question) noexcept;

}  // namespace pydedup
