// SPDX-License-Identifier: Apache-2.0
// Sums of windows (RowsKernels::Windows), over the vector types of gemm_<isa>-inl.hpp. An -inl file
// of an ISA includes this one INSIDE its own anonymous namespace.

// Vectors of a row of sums that stay in registers, and of how many rows they do: 16 registers of
// 32, or 8 of 16, and never so few that each has to wait for its last sum.
template <class V>
constexpr std::size_t kWindowVectors = sizeof(typename V::Reg) == 32 ? 2 : 4;
template <std::size_t VN>
constexpr std::size_t kRowsOf = VN == 1 ? 8 : 4;

// Keeps GCC from reading a vector again for each use of it, as an operand in memory.
template <class Reg>
void keep(Reg& vector) noexcept {
#if defined(__aarch64__)
    asm("" : "+w"(vector));
#else
    asm("" : "+v"(vector));
#endif
}

// Adds L weights of a chain. Each vector of elements is read once for all rows of sums; nothing
// depends on data, so that all is straight code.
template <class V, std::size_t VN, std::size_t L>
inline __attribute__((always_inline)) void add_chain(
    const typename V::Elem* row, const typename V::Elem* weights, std::size_t step,
    std::size_t pitch, typename V::Reg (&sums)[kRowsOf<VN>][VN]) noexcept {
    using Reg = typename V::Reg;
    Reg factors[L];
#pragma GCC unroll 8
    for (std::size_t k = 0; k < L; ++k) factors[k] = V::set1(weights[k * step]);
#pragma GCC unroll 16
    for (std::size_t q = 0; q < kRowsOf<VN> + L - 1; ++q, row += pitch) {
        Reg seen[VN];
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) {
            seen[v] = V::load(row + v * V::kLanes);
            keep(seen[v]);
        }
#pragma GCC unroll 8
        for (std::size_t r = 0; r < kRowsOf<VN>; ++r) {
            if (q < r || q - r >= L) continue;
#pragma GCC unroll 4
            for (std::size_t v = 0; v < VN; ++v) {
                sums[r][v] = V::fma(seen[v], factors[q - r], sums[r][v]);
            }
        }
    }
}

// VN vectors of kRowsOf rows.
template <class V, std::size_t VN>
void sum_windows_fixed(const WindowChain<typename V::Elem>* chains, std::size_t n, std::size_t from,
                       std::size_t pitch, typename V::Elem* to, std::size_t ld_to) noexcept {
    typename V::Reg sums[kRowsOf<VN>][VN];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < kRowsOf<VN>; ++r) {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) sums[r][v] = V::load(to + r * ld_to + v * V::kLanes);
    }
    for (const auto* chain = chains; chain < chains + n; ++chain) {
        const typename V::Elem* row = chain->from + from;
        const typename V::Elem* weights = chain->weights;
        const std::size_t step = chain->step;
        std::size_t length = chain->length;
        for (; length >= 7; length -= 7, row += 7 * pitch, weights += 7 * step) {
            add_chain<V, VN, 7>(row, weights, step, pitch, sums);
        }
        switch (length) {
            case 1:
                add_chain<V, VN, 1>(row, weights, step, pitch, sums);
                break;
            case 2:
                add_chain<V, VN, 2>(row, weights, step, pitch, sums);
                break;
            case 3:
                add_chain<V, VN, 3>(row, weights, step, pitch, sums);
                break;
            case 4:
                add_chain<V, VN, 4>(row, weights, step, pitch, sums);
                break;
            case 5:
                add_chain<V, VN, 5>(row, weights, step, pitch, sums);
                break;
            case 6:
                add_chain<V, VN, 6>(row, weights, step, pitch, sums);
                break;
            default:
                break;
        }
    }
#pragma GCC unroll 8
    for (std::size_t r = 0; r < kRowsOf<VN>; ++r) {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) V::store(to + r * ld_to + v * V::kLanes, sums[r][v]);
    }
}

template <class V, std::size_t VN>
void sum_windows_of(const WindowChain<typename V::Elem>* chains, std::size_t n, std::size_t from,
                    std::size_t pitch, std::size_t rows, typename V::Elem* to,
                    std::size_t ld_to) noexcept {
    for (std::size_t r = 0; r < rows; r += kRowsOf<VN>) {
        sum_windows_fixed<V, VN>(chains, n, from + r * pitch, pitch, to + r * ld_to, ld_to);
    }
}

template <class V>
void sum_windows(const WindowChain<typename V::Elem>* chains, std::size_t n, std::size_t pitch,
                 std::size_t rows, std::size_t cols, typename V::Elem* to,
                 std::size_t ld_to) noexcept {
    constexpr std::size_t kMost = kWindowVectors<V> * V::kLanes;
    std::size_t c = 0;
    for (; c + kMost - V::kLanes < cols; c += kMost) {
        sum_windows_of<V, kWindowVectors<V>>(chains, n, c, pitch, rows, to + c, ld_to);
    }
    if constexpr (kMost > 2 * V::kLanes) {
        if (c + V::kLanes < cols) {
            sum_windows_of<V, 2>(chains, n, c, pitch, rows, to + c, ld_to);
            c += 2 * V::kLanes;
        }
    }
    if (c < cols) sum_windows_of<V, 1>(chains, n, c, pitch, rows, to + c, ld_to);
}
