// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "similarity/index.hpp"

namespace pydedup::similarity {
namespace {

constexpr std::uint64_t kShiftStream = 4;
constexpr std::uint64_t kFactorStream = 5;

}  // namespace

Hashing::Hashing(const LshParameters& parameters)
    : bands_(parameters.bands),
      band_rows_(parameters.band_rows),
      width_(static_cast<std::int32_t>(std::floor(parameters.r * kSketchUnit + 0.5))),
      raise_((kSketchMost + width_) / width_ * width_),
      reciprocal_(((std::uint64_t{1} << 40) + static_cast<std::uint64_t>(width_) - 1) /
                  static_cast<std::uint64_t>(width_)),
      shifts_(bands_ * band_rows_),
      factors_(bands_ * band_rows_) {
    const std::uint64_t shift_seed = stream_seed(parameters.seed, kShiftStream);
    const std::uint64_t factor_seed = stream_seed(parameters.seed, kFactorStream);
    for (std::size_t j = 0; j < shifts_.size(); ++j) {
        const std::uint64_t uniform = random_word(shift_seed, j) >> 32;
        shifts_[j] =
            raise_ + static_cast<std::int32_t>(uniform * static_cast<std::uint64_t>(width_) >> 32);
        factors_[j] = random_word(factor_seed, j) | 1;
    }
}

std::uint64_t Hashing::key(const std::int16_t* sketch, std::size_t band) const noexcept {
    std::uint64_t sum = 0;
    for (std::size_t j = band * band_rows_; j < (band + 1) * band_rows_; ++j) {
        sum += raised(sketch, j) * factors_[j];
    }
    sum = (sum ^ (sum >> 32)) * 0xD6E8FEB86659FD93ULL;
    return sum ^ (sum >> 32);
}

void Hashing::lows(const std::int16_t* sketch, std::int32_t* out) const noexcept {
    for (std::size_t j = 0; j < shifts_.size(); ++j) {
        out[j] = static_cast<std::int32_t>(raised(sketch, j)) * width_ - shifts_[j];
    }
}

bool Hashing::same_band(const std::int16_t* sketch, const std::int32_t* lows,
                        std::size_t band) const noexcept {
    std::uint32_t beyond = 0;
    for (std::size_t j = band * band_rows_; j < (band + 1) * band_rows_; ++j) {
        const auto above = static_cast<std::uint32_t>(sketch[j] - lows[j]);
        beyond |= above >= static_cast<std::uint32_t>(width_) ? 1U : 0U;
    }
    return beyond == 0;
}

}  // namespace pydedup::similarity
