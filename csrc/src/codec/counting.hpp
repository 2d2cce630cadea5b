// SPDX-License-Identifier: Apache-2.0
// Histograms, for choosing codes. Private to codec/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pydedup::detail {

/// Counts in `kParts` tables in turns: what is frequent then does not wait for the store of the
/// count before.
template <std::size_t kParts>
class Counts {
  public:
    explicit Counts(std::size_t size) : size_(size), parts_(kParts * size) {}

    /// Counts index(0) to index(n - 1), each below the size.
    template <class Index>
    void add(std::size_t n, Index index) noexcept {
        std::uint32_t* const parts = parts_.data();
        std::size_t i = 0;
        for (; i + kParts <= n; i += kParts) {
            for (std::size_t k = 0; k < kParts; ++k) ++parts[k * size_ + index(i + k)];
        }
        for (; i < n; ++i) ++parts[index(i)];
    }

    [[nodiscard]] std::uint32_t operator[](std::size_t i) const noexcept {
        std::uint32_t sum = 0;
        for (std::size_t k = 0; k < kParts; ++k) sum += parts_[k * size_ + i];
        return sum;
    }

  private:
    std::size_t size_;
    std::vector<std::uint32_t> parts_;
};

}  // namespace pydedup::detail
