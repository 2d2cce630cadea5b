// SPDX-License-Identifier: Apache-2.0
// The body of tile_nt (gemm_kernels.hpp), included INSIDE the anonymous namespace of an instruction
// set (no guard on purpose).
//
// V: Elem, Reg (of elements), kLanes (of sums), load and load_n of elements, load and store of
//    sums, fma(x, w, sums). Where tiles of groups are instantiated, also repeat<G>(p) and
//    repeat_n<G>(p, n): G elements, or n < G and zeros, over and over.

// Elements of a register.
template <class V>
constexpr std::size_t kRegister = sizeof(typename V::Reg) / sizeof(typename V::Elem);

// G neighbouring elements of a row of w, repeated over a register; the n < G first and zeros.
template <class V, std::size_t G>
typename V::Reg repeat(const typename V::Elem* w) noexcept {
    if constexpr (G == 1) {
        return V::set1(*w);
    } else if constexpr (G == kRegister<V>) {
        return V::load(w);
    } else {
        return V::template repeat<G>(w);
    }
}

template <class V, std::size_t G>
typename V::Reg repeat_n(const typename V::Elem* w, std::size_t n) noexcept {
    if constexpr (G == kRegister<V>) {
        return V::load_n(w, n);
    } else {
        return V::template repeat_n<G>(w, n);
    }
}

// VN vectors of x by R rows of w; what is read of w at once is used in VN products. With Ahead, as
// many bytes as are read of w are prefetched from `next` on: evenly, since a burst of prefetches
// fills the queue that loads need, too.
template <class V, std::size_t VN, std::size_t R, std::size_t G, bool Ahead, class A>
void tile_nt_fixed(const typename V::Elem* x, const typename V::Elem* w, std::size_t cols,
                   std::size_t ldw, const typename V::Elem* next, A* acc) noexcept {
    using Reg = typename V::Reg;
    constexpr std::size_t kLanes = VN * V::kLanes;
    constexpr std::size_t kLine = 64 / sizeof(typename V::Elem);
    decltype(V::load(acc)) sums[R][VN];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) sums[r][v] = V::load(acc + r * kLanes + v * V::kLanes);
    }
    const auto multiply = [&](std::size_t r, const Reg* xs, Reg ws) noexcept {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) sums[r][v] = V::fma(xs[v], ws, sums[r][v]);
    };
    std::size_t c = 0;
    for (; c + G <= cols; c += G, x += VN * kRegister<V>) {
        if constexpr (Ahead) {
#pragma GCC unroll 16
            for (std::size_t k = 0; k < R * G; k += kLine) __builtin_prefetch(next + k, 0, 2);
            next += R * G;
        }
        Reg xs[VN];
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) xs[v] = V::load(x + v * kRegister<V>);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < R; ++r) multiply(r, xs, repeat<V, G>(w + r * ldw + c));
    }
    if constexpr (G > 1) {
        if (c < cols) {
            Reg xs[VN];
#pragma GCC unroll 4
            for (std::size_t v = 0; v < VN; ++v) xs[v] = V::load(x + v * kRegister<V>);
#pragma GCC unroll 16
            for (std::size_t r = 0; r < R; ++r) {
                multiply(r, xs, repeat_n<V, G>(w + r * ldw + c, cols - c));
            }
        }
    }
#pragma GCC unroll 16
    for (std::size_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) V::store(acc + r * kLanes + v * V::kLanes, sums[r][v]);
    }
}

template <class V, std::size_t VN, std::size_t R, std::size_t G = 1, class A = typename V::Elem>
void tile_nt(const typename V::Elem* x, const typename V::Elem* w, std::size_t rows,
             std::size_t cols, std::size_t ldw, const typename V::Elem* next, A* acc) noexcept {
    constexpr std::size_t kLanes = VN * V::kLanes;
    std::size_t r = 0;
    if (next != nullptr) {
        for (; r + R <= rows; r += R) {
            tile_nt_fixed<V, VN, R, G, true>(x, w + r * ldw, cols, ldw, next + r * cols,
                                             acc + r * kLanes);
        }
    }
    for (; r + R <= rows; r += R) {
        tile_nt_fixed<V, VN, R, G, false>(x, w + r * ldw, cols, ldw, nullptr, acc + r * kLanes);
    }
    for (; r + 4 <= rows; r += 4) {
        tile_nt_fixed<V, VN, 4, G, false>(x, w + r * ldw, cols, ldw, nullptr, acc + r * kLanes);
    }
    for (; r < rows; ++r) {
        tile_nt_fixed<V, VN, 1, G, false>(x, w + r * ldw, cols, ldw, nullptr, acc + r * kLanes);
    }
}
