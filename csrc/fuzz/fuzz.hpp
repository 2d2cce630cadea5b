// SPDX-License-Identifier: Apache-2.0
// A fuzz target is fuzz_<name>.cpp: LLVMFuzzerTestOneInput, and seeds() that make the first inputs,
// so that no corpus is kept in the repository. Linked with libFuzzer it searches (`make fuzz`);
// linked with replay.cpp it is a native test that every compiler builds.
//
// A target may fail in three ways: a sanitizer's report, an exception that is no pydedup::Error,
// and require().
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "pydedup/hash.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace pydedup::fuzz {

using Input = std::vector<std::uint8_t>;

/// Well-formed inputs of this target, small ones.
[[nodiscard]] std::vector<Input> seeds();

/// Aborts, which both drivers take for a finding.
inline void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "fuzz: does not hold: %s\n", what);
    std::abort();
}

/// Takes small numbers from the front of an input; 0 where it has ended.
class Reader {
  public:
    Reader(const std::uint8_t* data, std::size_t size) : rest_(data, size) {}

    std::uint8_t byte() {
        if (rest_.empty()) return 0;
        const std::uint8_t value = rest_.front();
        rest_ = rest_.subspan(1);
        return value;
    }
    std::uint32_t word() {
        const std::uint32_t low = byte();
        return low | static_cast<std::uint32_t>(byte()) << 8;
    }
    /// What is left, in memory that ends where it ends: one byte too far is seen.
    [[nodiscard]] Input rest() const { return {rest_.begin(), rest_.end()}; }

  private:
    std::span<const std::uint8_t> rest_;
};

/// Adds bytes to an input that is being made.
inline void append(Input& input, Bytes bytes) {
    for (const std::byte byte : bytes) input.push_back(static_cast<std::uint8_t>(byte));
}

inline Bytes as_bytes(std::span<const std::uint8_t> data) { return std::as_bytes(data); }

/// Pages and saved indexes have their checksum in bytes 8 to 23, of all that follows, seeded by the
/// first 8. With it made right, an input gets past it to the checks behind.
inline void repair_checksum(Input& data) {
    if (data.size() < 24) return;
    std::uint64_t seed;
    std::memcpy(&seed, data.data(), sizeof seed);
    const Digest digest = hash_bytes(as_bytes(data).subspan(24), seed);
    std::memcpy(data.data() + 8, &digest.lo, 8);
    std::memcpy(data.data() + 16, &digest.hi, 8);
}

/// The little linear congruential generator that makes seeds: the same everywhere.
class Random {
  public:
    std::uint32_t next() {
        state_ = state_ * 6364136223846793005ULL + 1442695040888963407ULL;
        return static_cast<std::uint32_t>(state_ >> 33);
    }

  private:
    std::uint64_t state_ = 1;
};

}  // namespace pydedup::fuzz
