// SPDX-License-Identifier: Apache-2.0
// What tests of blocks in bytes share.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "pydedup/codec.hpp"

namespace pydedup::testing {

inline constexpr std::array kDtypes = {Dtype::f64,     Dtype::f32,     Dtype::f16,    Dtype::bf16,
                                       Dtype::i8,      Dtype::i16,     Dtype::i32,    Dtype::i64,
                                       Dtype::u8,      Dtype::u16,     Dtype::u32,    Dtype::u64,
                                       Dtype::boolean, Dtype::f8_e4m3, Dtype::f8_e5m2};

using Buffer = std::vector<std::uint8_t>;

inline const std::byte* at(const Buffer& bytes) {
    return reinterpret_cast<const std::byte*>(bytes.data());
}
inline std::byte* at(Buffer& bytes) { return reinterpret_cast<std::byte*>(bytes.data()); }

inline MatrixRef matrix(const Buffer& bytes, std::size_t rows, std::size_t cols, Dtype dtype,
                        std::size_t stride = 0) {
    return {at(bytes), rows, cols, stride != 0 ? stride : cols * item_bytes(dtype), dtype};
}

inline BlockView view(const Buffer& bytes, std::size_t rows, std::size_t cols, Dtype dtype,
                      Encoding encoding = Encoding::raw) {
    return {at(bytes),
            static_cast<std::uint32_t>(bytes.size()),
            encoding,
            dtype,
            static_cast<std::uint32_t>(rows),
            static_cast<std::uint32_t>(cols),
            is_delta(encoding) ? 1U : 0U};
}

}  // namespace pydedup::testing
