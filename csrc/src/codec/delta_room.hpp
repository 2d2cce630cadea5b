// SPDX-License-Identifier: Apache-2.0
// Memory of the delta encodings. Private to codec/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace pydedup::detail {

/// Arrays for the elements of one block, aligned to 64 bytes; blocks of usual size reuse one piece
/// of memory per thread, so a thread has one Room at a time.
struct Room {
    Room(std::size_t count, std::size_t item);

    std::uint8_t* block;      ///< elements
    std::uint8_t* values_of;  ///< f32 or f64 of each element
    std::uint8_t* z;          ///< u32 of each element, u64 when they have 8 bytes
    std::uint8_t* classes;
    std::uint8_t* symbols;
    std::uint8_t* contexts;
    std::uint8_t* features;

  private:
    static constexpr std::size_t kKept = 512 * 1024;
    std::unique_ptr<std::uint8_t[]> own_;
};

}  // namespace pydedup::detail
