// SPDX-License-Identifier: Apache-2.0
// A row of a product of two thin matrices of whole numbers: exact, so in whatever order. Included
// by delta_common-inl.hpp alone, inside the namespace of each instruction set (no guard on
// purpose).

inline void delta_products(const double* of_row, const double* of_cols, std::size_t rank,
                           std::size_t cols, double* sums) noexcept {
    constexpr std::size_t kVectors = kProductLanes * sizeof(double) / kVectorBytes;
    constexpr std::size_t kLanes = kVectorBytes / sizeof(double);
    for (std::size_t j = 0; j < cols; j += kProductLanes) {
        Doubles total[kVectors] = {};
        for (std::size_t k = 0; k < rank; ++k) {
            const double* const from = of_cols + k * cols + j;
            for (std::size_t v = 0; v < kVectors; ++v) {
                Doubles factor;
                load_vector(factor, from + v * kLanes);
                total[v] += of_row[k] * factor;
            }
        }
        __builtin_memcpy(sums + j, total, sizeof total);
    }
}
