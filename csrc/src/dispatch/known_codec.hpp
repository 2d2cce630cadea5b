// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "kernels/codec_kernels.hpp"

namespace pydedup {

/// Whether both answer alike what becomes of these 700 bytes: planes, differences, contexts,
/// streams of symbols and raw bits, forth and back. Private to dispatch/.
[[nodiscard]] bool same_codec(const CodecKernels& codec, const CodecKernels& reference,
                              std::span<const std::uint8_t> question) noexcept;

}  // namespace pydedup
