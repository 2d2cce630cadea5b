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

// Columns between two steps of what is asked for ahead.
template <std::size_t G>
constexpr std::size_t kAheadColumns = G == 1 ? 4 : G;

// Asks for some elements, which begin in the middle of a line if need be, to be in the second-level
// cache (2) or the first (3).
template <std::size_t Elements, int Level = 2, class E>
void ask_for(const E* from) noexcept {
    constexpr std::size_t kLine = 64 / sizeof(E);
#pragma GCC unroll 16
    for (std::size_t k = 0; k < Elements; k += kLine) __builtin_prefetch(from + k, 0, Level);
}

// Whether a tile has so few rows that lines of w are used up faster than they come from the
// second-level cache, where only what is needed soon is asked for: 16 rows of f32 and fewer.
// (A Xeon with AMX, w from memory: 8 rows take 6.0 ms instead of 8.4, 32 rows none less.)
template <class E, std::size_t G>
constexpr bool kAsksForSoon = G * sizeof(E) >= 8;

// VN vectors of x by R rows of w; what is read of w at once is used in VN products. Every
// kAheadColumns, so many elements are asked for from next_w and from next_x on, and perhaps from
// soon on as many as are used. How many is known to the compiler: to count takes registers that the
// addresses of w are in (a tenth slower).
template <class V, std::size_t VN, std::size_t R, std::size_t G, std::size_t StepW,
          std::size_t StepX, class E, class A>
[[gnu::noinline]] void tile_nt_fixed(const E* x, const E* w, std::size_t cols, std::size_t ldw,
                                     const E* soon, const E* next_w, const E* next_x,
                                     A* acc) noexcept {
    using Reg = typename V::Reg;
    constexpr std::size_t kLanes = VN * V::kLanes;
    decltype(V::load(acc)) sums[R][VN];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) sums[r][v] = V::load(acc + r * kLanes + v * V::kLanes);
    }
    const auto multiply = [&sums](std::size_t r, const Reg* xs, Reg ws) noexcept {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) sums[r][v] = V::fma(xs[v], ws, sums[r][v]);
    };
    const auto multiply_group = [&](const E* from_x, const E* from_w) noexcept {
        Reg xs[VN];
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) xs[v] = V::load(from_x + v * kRegister<V>);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < R; ++r) multiply(r, xs, repeat<V, G>(from_w + r * ldw));
    };
    std::size_t c = 0;
    for (; c + kAheadColumns<G> <= cols; c += kAheadColumns<G>) {
        ask_for<StepW>(next_w);
        next_w += StepW;
        ask_for<StepX>(next_x);
        next_x += StepX;
        if constexpr (kAsksForSoon<E, G>) ask_for<R * kAheadColumns<G>, 3>(soon + c * R);
#pragma GCC unroll 4
        for (std::size_t k = 0; k < kAheadColumns<G> / G; ++k) {
            multiply_group(x + k * VN * kRegister<V>, w + c + k * G);
        }
        x += kAheadColumns<G> / G * VN * kRegister<V>;
    }
    for (; c + G <= cols; c += G, x += VN * kRegister<V>) multiply_group(x, w + c);
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

// Memory that is asked for evenly: a burst of prefetches fills the queue that loads need, too.
template <class E>
class Ahead {
  public:
    static constexpr std::size_t kLine = 64 / sizeof(E);

    Ahead(const E* begin, const E* end, std::size_t steps, std::size_t most) noexcept
        : at(begin), end_(end) {
        const auto elements = static_cast<std::size_t>(end - begin);
        step_ = kLine < most && elements <= steps * kLine ? kLine : most;
    }
    // Elements to ask for in each step now: a line, or the most.
    [[nodiscard]] std::size_t step() const noexcept { return at < end_ ? step_ : 0; }
    void asked(std::size_t steps) noexcept { at += step() * steps; }

    const E* at;

  private:
    const E* end_;
    std::size_t step_;
};

template <class V, std::size_t VN, std::size_t R, std::size_t G = 1, class E, class A>
void tile_nt(const E* x, const E* w, std::size_t rows, std::size_t cols, std::size_t ldw,
             const GemmNext<E>& next, A* acc) noexcept {
    constexpr std::size_t kLanes = VN * V::kLanes;
    // What a step asks for of a block as large as this one; a tile of few rows is too little of x
    // to be asked for.
    constexpr std::size_t kLine = Ahead<E>::kLine;
    constexpr std::size_t kMostW = R * kAheadColumns<G>;
    constexpr std::size_t kMostX = G <= 2 ? 2 * kLine : 0;
    const std::size_t steps = cols / kAheadColumns<G>;
    Ahead<E> next_w(next.w, next.w_end, rows / R * steps, kMostW);
    Ahead<E> next_x(next.x, next.x_end, rows / R * steps, kMostX);
    std::size_t r = 0;
    // What comes behind rows before r, where that lies in a piece.
    const auto soon_from = [&](std::size_t after) noexcept {
        if (after + R > rows) return next.w == nullptr ? w : next.w;
        return ldw == cols ? w + after * ldw : w;
    };
    const auto multiply = [&]<std::size_t StepW, std::size_t StepX>() noexcept {
        tile_nt_fixed<V, VN, R, G, StepW, StepX>(x, w + r * ldw, cols, ldw, soon_from(r + R),
                                                 next_w.at, next_x.at, acc + r * kLanes);
    };
    const auto with_x = [&]<std::size_t StepW>() noexcept {
        if constexpr (kMostX != 0) {
            if (next_x.step() == kLine) return multiply.template operator()<StepW, kLine>();
            if (next_x.step() != 0) return multiply.template operator()<StepW, kMostX>();
        }
        multiply.template operator()<StepW, 0>();
    };
    for (; r + R <= rows; r += R) {
        if (next_w.step() == 0) {
            with_x.template operator()<0>();
        } else if (next_w.step() == kLine) {
            with_x.template operator()<kLine>();
        } else {
            with_x.template operator()<kMostW>();
        }
        next_w.asked(steps);
        next_x.asked(steps);
    }
    for (; r + 4 <= rows; r += 4) {
        tile_nt_fixed<V, VN, 4, G, 0, 0>(x, w + r * ldw, cols, ldw, w, next.w, next.x,
                                         acc + r * kLanes);
    }
    for (; r < rows; ++r) {
        tile_nt_fixed<V, VN, 1, G, 0, 0>(x, w + r * ldw, cols, ldw, w, next.w, next.x,
                                         acc + r * kLanes);
    }
}
