// SPDX-License-Identifier: Apache-2.0
// What the tests of products compare with: long sums in extended precision, and the error bound of
// any order of summation.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "dispatch/dispatch.hpp"

namespace pydedup::testing {

inline std::mt19937_64& rng() {
    static std::mt19937_64 engine(7);
    return engine;
}

template <class T>
std::vector<T> normal(std::size_t count) {
    std::normal_distribution<double> draw(0.0, 1.0);
    std::vector<T> values(count);
    for (T& value : values) value = static_cast<T>(draw(rng()));
    return values;
}

// Memory that ends where the values end: a read beyond is seen by the address sanitizer.
template <class T>
std::unique_ptr<T[]> tight(const std::vector<T>& values) {
    auto memory = std::make_unique<T[]>(values.size());
    std::copy(values.begin(), values.end(), memory.get());
    return memory;
}

// Of a float what a bf16 number holds, and a bf16 number as a float.
inline std::uint16_t upper_half(float value) {
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
}
inline float widened(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

inline std::vector<std::uint16_t> halves_of(const std::vector<float>& values) {
    std::vector<std::uint16_t> bits(values.size());
    std::transform(values.begin(), values.end(), bits.begin(), upper_half);
    return bits;
}
inline std::vector<float> floats_of(const std::vector<std::uint16_t>& halves) {
    std::vector<float> values(halves.size());
    std::transform(halves.begin(), halves.end(), values.begin(), widened);
    return values;
}

// Rounded to the nearest bf16 numbers.
inline std::vector<std::uint16_t> rounded(const std::vector<float>& values) {
    std::vector<std::uint16_t> bits(values.size());
    kernels_named("scalar").gemm.f32_to_bf16(values.data(), values.size(), bits.data());
    return bits;
}

// |computed - exact| <= gamma * sum of |terms| for any order of adding n terms (Higham, Accuracy
// and Stability of Numerical Algorithms, 2002, section 3.1); 2 for the rounding of each product.
template <class T>
double bound(std::size_t n, double magnitude) {
    return static_cast<double>(n + 2) * std::numeric_limits<T>::epsilon() * magnitude +
           std::numeric_limits<T>::min();
}

template <class T>
struct Exact {
    std::vector<double> value, magnitude;
    std::size_t terms;

    [[nodiscard]] bool agrees(const std::vector<T>& y) const {
        for (std::size_t i = 0; i < y.size(); ++i) {
            if (!(std::abs(y[i] - value[i]) <= bound<T>(terms, magnitude[i]))) return false;
        }
        return y.size() == value.size();
    }
};

// x (m x k) times w: w is n x k, or k x n when transposed; added to y0.
template <class T>
Exact<T> exact(const std::vector<T>& x, const std::vector<T>& w, std::size_t m, std::size_t n,
               std::size_t k, bool transpose, const std::vector<T>& y0) {
    // For f32 double is long enough; where long double is more than 80 bits it is slow.
    using Wide = std::conditional_t<sizeof(T) == 4, double, long double>;
    Exact<T> sums{std::vector<double>(m * n), std::vector<double>(m * n), k + 1};
    for (std::size_t i = 0; i < m; ++i) {
        for (std::size_t j = 0; j < n; ++j) {
            Wide sum = y0[i * n + j];
            Wide magnitude = std::abs(y0[i * n + j]);
            for (std::size_t c = 0; c < k; ++c) {
                const Wide term =
                    static_cast<Wide>(x[i * k + c]) * (transpose ? w[c * n + j] : w[j * k + c]);
                sum += term;
                magnitude += std::abs(term);
            }
            sums.value[i * n + j] = static_cast<double>(sum);
            sums.magnitude[i * n + j] = static_cast<double>(magnitude);
        }
    }
    return sums;
}

}  // namespace pydedup::testing
