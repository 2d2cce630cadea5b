// SPDX-License-Identifier: Apache-2.0
// Bits of what stands in front of a delta's streams, and of its lists: least significant bit first.
// Private to codec/.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "base/endian.hpp"
#include "codec/delta_model.hpp"

namespace pydedup::detail {

/// finish() fills up the last byte with zeros.
class BitSink {
  public:
    explicit BitSink(Sink& sink) : sink_(sink) {}
    void put(unsigned value, unsigned bits) {
        held_ |= std::uint64_t{value} << pending_;
        pending_ += bits;
        for (; pending_ >= 8; pending_ -= 8) {
            sink_.push_back(static_cast<std::uint8_t>(held_));
            held_ >>= 8;
        }
    }
    void finish() {
        if (pending_ != 0) sink_.push_back(static_cast<std::uint8_t>(held_));
    }

  private:
    Sink& sink_;
    std::uint64_t held_ = 0;
    unsigned pending_ = 0;  // below 8 between calls
};

/// Behind the end there are zeros; finish() tells.
class BitSource {
  public:
    explicit BitSource(Source& source) : source_(source) {}
    /// The next bits, at most 32.
    unsigned value(unsigned bits) noexcept {
        if (held_bits_ < bits) fill();
        const auto value = static_cast<unsigned>(held_ & ((std::uint64_t{1} << bits) - 1));
        skip(bits);
        return value;
    }
    /// How many ones there are before a zero, which is taken with them; for more than `most`,
    /// which is at most 31, one more than that, and nothing is taken.
    unsigned ones(unsigned most) noexcept {
        if (held_bits_ <= most) fill();
        const auto n = static_cast<unsigned>(std::countr_one(held_));
        if (n > most) return most + 1;
        skip(n + 1);
        return n;
    }
    /// Takes what was read from the source, which fails if it ends before that. Returns whether
    /// the unused bits of the last byte are 0.
    [[nodiscard]] bool finish() noexcept {
        const std::size_t whole = position_ / 8;
        const std::span<const std::uint8_t> taken = source_.take((position_ + 7) / 8);
        return source_.failed || whole == taken.size() || taken[whole] >> (position_ % 8) == 0;
    }

  private:
    static constexpr unsigned kFilled = 56;

    void skip(unsigned bits) noexcept {
        held_ >>= bits;
        held_bits_ -= bits;
        position_ += bits;
    }
    // Holds the next bits, zeros behind them.
    void fill() noexcept {
        const std::size_t at = position_ / 8;
        const std::size_t size = source_.left.size();
        std::array<std::byte, 8> bytes{};
        if (at + bytes.size() <= size) {  // a copy of fixed size is one load
            std::memcpy(bytes.data(), source_.left.data() + at, bytes.size());
        } else if (at < size) {
            std::memcpy(bytes.data(), source_.left.data() + at, size - at);
        }
        held_ = load_le<std::uint64_t>(bytes.data()) >> (position_ % 8) &
                ((std::uint64_t{1} << kFilled) - 1);
        held_bits_ = kFilled;
    }

    Source& source_;
    std::size_t position_ = 0;
    std::uint64_t held_ = 0;  // the next bits, the first one lowest
    unsigned held_bits_ = 0;
};

}  // namespace pydedup::detail
