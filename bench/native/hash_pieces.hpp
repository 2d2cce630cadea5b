// SPDX-License-Identifier: Apache-2.0
// The pieces that are hashed in cache, by pydedup and by xxHash.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

namespace bench {

struct HashPiece {
    const char* name;
    const char* what;
    std::size_t bytes;
    std::size_t offset;  ///< of its first byte from a multiple of 64
};

inline constexpr HashPiece kHashPieces[] = {
    {"64", "64 bytes", 64, 0},
    {"256", "256 bytes", 256, 0},
    {"1k", "1 KiB", 1024, 0},
    {"4k", "4 KiB", 4096, 0},
    {"16k", "16 KiB", 16384, 0},
    {"64k", "64 KiB", 65536, 0},
    {"64k-off16", "64 KiB, 16 bytes off a multiple of 64 (as malloc gives it)", 65536, 16},
    {"1m", "1 MiB", std::size_t{1} << 20, 0},
};

inline std::shared_ptr<std::vector<std::uint8_t>> piece_bytes(const HashPiece& piece) {
    auto data = std::make_shared<std::vector<std::uint8_t>>(piece.bytes + 128);
    std::minstd_rand random(1);
    for (std::uint8_t& byte : *data) byte = static_cast<std::uint8_t>(random() >> 8);
    return data;
}

inline const std::uint8_t* piece_start(const std::vector<std::uint8_t>& data,
                                       const HashPiece& piece) {
    const auto address = reinterpret_cast<std::uintptr_t>(data.data());
    return data.data() + (64 - address % 64) % 64 + piece.offset;
}

}  // namespace bench
