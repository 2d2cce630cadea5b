// SPDX-License-Identifier: Apache-2.0
// Bodies of the vector kernels, over the vector and weight types of gemm_<isa>-inl.hpp (described
// in gemm_vector-inl.hpp). An -inl file of an ISA includes this one INSIDE its anonymous namespace:
// no include guard, no include here.

// Rows that are asked of memory ahead of their use. Rows of a bag lie anywhere, so the hardware
// cannot know the next one.
constexpr std::size_t kRowsAhead = 16;

// VN vectors of the sum stay in registers while all rows pass; `last` is the number of columns in
// the last vector, below kLanes only when Tail.
template <class V, class Weight, std::size_t VN, bool Tail, bool Scaled>
void sum_rows_fixed(const typename Weight::Elem* const* from, std::size_t n,
                    const typename V::Elem* scale, std::size_t column, std::size_t last,
                    typename V::Elem* sum) noexcept {
    using Reg = typename V::Reg;
    constexpr std::size_t kLine = 64 / sizeof(typename Weight::Elem);
    Reg sums[VN];
#pragma GCC unroll 4
    for (std::size_t v = 0; v < VN; ++v) {
        sums[v] = Tail && v == VN - 1 ? V::load_n(sum + v * V::kLanes, last)
                                      : V::load(sum + v * V::kLanes);
    }
    for (std::size_t i = 0; i < n; ++i) {
        if (i + kRowsAhead < n) {
            const typename Weight::Elem* const ahead = from[i + kRowsAhead] + column;
#pragma GCC unroll 8
            for (std::size_t c = 0; c < VN * V::kLanes; c += kLine) __builtin_prefetch(ahead + c);
        }
        const typename Weight::Elem* const row = from[i] + column;
        Reg factor{};
        if constexpr (Scaled) factor = V::set1(scale[i]);
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) {
            const Reg values = Tail && v == VN - 1 ? Weight::load_n(row + v * V::kLanes, last)
                                                   : Weight::load(row + v * V::kLanes);
            sums[v] = Scaled ? V::fma(values, factor, sums[v]) : V::add(values, sums[v]);
        }
    }
#pragma GCC unroll 4
    for (std::size_t v = 0; v < VN; ++v) {
        if (Tail && v == VN - 1) {
            V::store_n(sum + v * V::kLanes, sums[v], last);
        } else {
            V::store(sum + v * V::kLanes, sums[v]);
        }
    }
}

template <class V, class Weight, bool Scaled>
void sum_rows_all(const typename Weight::Elem* const* from, std::size_t n,
                  const typename V::Elem* scale, std::size_t count,
                  typename V::Elem* sum) noexcept {
    constexpr std::size_t kVectors = 4;
    std::size_t c = 0;
    for (; c + kVectors * V::kLanes <= count; c += kVectors * V::kLanes) {
        sum_rows_fixed<V, Weight, kVectors, false, Scaled>(from, n, scale, c, V::kLanes, sum + c);
    }
    if (c + 2 * V::kLanes <= count) {
        sum_rows_fixed<V, Weight, 2, false, Scaled>(from, n, scale, c, V::kLanes, sum + c);
        c += 2 * V::kLanes;
    }
    if (c + V::kLanes <= count) {
        sum_rows_fixed<V, Weight, 1, false, Scaled>(from, n, scale, c, V::kLanes, sum + c);
        c += V::kLanes;
    }
    if (c < count) {
        sum_rows_fixed<V, Weight, 1, true, Scaled>(from, n, scale, c, count - c, sum + c);
    }
}

template <class V, class Weight>
void sum_rows(const typename Weight::Elem* const* from, std::size_t n,
              const typename V::Elem* scale, std::size_t count, typename V::Elem* sum) noexcept {
    if (scale == nullptr) {
        sum_rows_all<V, Weight, false>(from, n, scale, count, sum);
    } else {
        sum_rows_all<V, Weight, true>(from, n, scale, count, sum);
    }
}

#include "kernels/rows_windows-inl.hpp"

// The last vector of a row begins where it ends with the row.
template <class V>
void copy_row(const typename V::Elem* from, std::size_t count, typename V::Elem* to) noexcept {
    if (count < V::kLanes) return V::store_n(to, V::load_n(from, count), count);
    const std::size_t last = count - V::kLanes;
    for (std::size_t i = 0; i < last; i += V::kLanes) V::store(to + i, V::load(from + i));
    V::store(to + last, V::load(from + last));
}

// A constant distance is what the compiler makes shuffles of.
template <std::size_t Stride, class T>
void pick_fixed(const T* from, std::size_t count, T* to) noexcept {
    for (std::size_t i = 0; i < count; ++i) to[i] = from[i * Stride];
}

template <class V>
void pick(const typename V::Elem* from, std::size_t ld, std::size_t stride, std::size_t rows,
          std::size_t cols, typename V::Elem* to, std::size_t ld_to) noexcept {
    const auto each_row = [&](auto pick_row) noexcept {
        for (std::size_t i = 0; i < rows; ++i) pick_row(from + i * ld, to + i * ld_to);
    };
    if (stride == 1) {
        each_row([=](const auto* a, auto* b) noexcept { copy_row<V>(a, cols, b); });
    } else if (stride == 2) {
        each_row([=](const auto* a, auto* b) noexcept { pick_fixed<2>(a, cols, b); });
    } else {
        each_row([=](const auto* a, auto* b) noexcept {
            for (std::size_t j = 0; j < cols; ++j) b[j] = a[j * stride];
        });
    }
}

// With a distance of 2 each is half of a word, whose other half falls out, but for the last one: it
// need not have another half.
void pick_bf16(const std::uint16_t* from, std::size_t ld, std::size_t stride, std::size_t rows,
               std::size_t cols, float* to, std::size_t ld_to) noexcept {
    const auto widen = [](std::uint32_t bits) noexcept {
        const std::uint32_t wide = bits << 16;
        float value;
        __builtin_memcpy(&value, &wide, sizeof value);
        return value;
    };
    for (std::size_t i = 0; i < rows; ++i, from += ld, to += ld_to) {
        std::size_t j = 0;
        if (stride == 1) {
            for (; j + F32::kLanes <= cols; j += F32::kLanes) {
                F32::store(to + j, Bf16Weight::load(from + j));
            }
            if (const std::size_t n = cols - j; n != 0) {
                F32::store_n(to + j, Bf16Weight::load_n(from + j, n), n);
                j = cols;
            }
        } else if (stride == 2) {
            for (; j + 1 < cols; ++j) {
                std::uint32_t word;
                __builtin_memcpy(&word, from + 2 * j, sizeof word);
                to[j] = widen(word);
            }
        }
        for (; j < cols; ++j) to[j] = widen(from[j * stride]);
    }
}

constexpr RowsKernels kRows = {
    sum_rows<F32, SameWeight<F32>>,
    sum_rows<F64, SameWeight<F64>>,
    sum_rows<F32, Bf16Weight>,
    sum_rows<F32, F16Weight>,
    sum_windows<F32>,
    sum_windows<F64>,
    pick<F32>,
    pick<F64>,
    pick_bf16,
    copy_runs,
};
