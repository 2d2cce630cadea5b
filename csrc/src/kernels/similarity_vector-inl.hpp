// SPDX-License-Identifier: Apache-2.0
// What the vector kernels share, written on registers of 16 logical lanes. Included INSIDE the
// namespace `sim` of an instruction set (no guard on purpose), after these were defined:
//
// V: 16 f32 lanes. Reg, Words (16 sign words), Move (a lane permutation i -> i ^ m); kFoldStrips
//    strips are folded at once; zero, add, sub, mul; load, store (aligned), load_any, store_any
//    (not aligned); load_words, shift (left), flip (negate where the highest bit is set),
//    make_move, move; butterfly<d> (lanes d apart); widen (to D::Reg), narrow (from it).
// D: 16 f64 lanes: zero, add, sub, mul, load_any, store_any, total (lanes 8 apart first, then 4, 2
//    and 1).
// Both: set1, abs, greatest(a, b) (b where a is NaN), count_within, max_of.
// F32, F64, F16, Bf16: kBytes, Num (V or D); value, value_n (n elements, zeros behind) give
//    Num::Reg.
// Keys32, Keys64 (see the end of this file), and sketch_distance.
//
// Each sum is over the same terms in the same order as in the scalar form, because lanes never mix:
// results are equal bit by bit.

inline V::Reg to_f32(const V::Reg& x) noexcept { return x; }
inline V::Reg to_f32(const D::Reg& x) noexcept { return V::narrow(x); }
inline D::Reg to_f64(const V::Reg& x) noexcept { return V::widen(x); }
inline D::Reg to_f64(const D::Reg& x) noexcept { return x; }

inline void add_to(double* sums, const V::Reg& x) noexcept {
    D::store_any(sums, D::add(D::load_any(sums), V::widen(x)));
}

// ---- folding ------------------------------------------------------------------------------------

template <class Element, std::size_t S>
void fold_full(const std::uint8_t* data, const FoldStrip& strip, std::size_t pitch,
               const std::uint8_t* ahead, const std::uint32_t* signs, const std::uint16_t* moves,
               float* buckets, double* squares) noexcept {
    V::Reg strip_squares[S];
    V::Move lane_moves[S];
    std::size_t group_moves[S];
#pragma GCC unroll 4
    for (std::size_t s = 0; s < S; ++s) {
        strip_squares[s] = V::zero();
        lane_moves[s] = V::make_move(moves[s] % kSimLanes);
        group_moves[s] = moves[s] / kSimLanes;
    }
    for (std::size_t half = 0; half < 2; ++half) {
        V::Words words[S];
#pragma GCC unroll 4
        for (std::size_t s = 0; s < S; ++s) {
            words[s] = V::load_words(signs + s * kSignWords + half * kSimLanes);
        }
        for (std::size_t g = half * 32; g < half * 32 + 32; ++g) {
            V::Reg sum = V::load(buckets + g * kSimLanes);
#pragma GCC unroll 4
            for (std::size_t s = 0; s < S; ++s) {
                const std::uint8_t* at = data + s * pitch + strip.offset[g ^ group_moves[s]];
                const V::Reg x = V::move(to_f32(Element::value(at)), lane_moves[s]);
                __builtin_prefetch(ahead + s * pitch + strip.offset[g], 0, 2);
                sum = V::add(sum, V::flip(x, words[s]));
                strip_squares[s] = V::add(strip_squares[s], V::mul(x, x));
                words[s] = V::shift(words[s], 1);
            }
            V::store(buckets + g * kSimLanes, sum);
        }
    }
#pragma GCC unroll 4
    for (std::size_t s = 0; s < S; ++s) add_to(squares, strip_squares[s]);
}

template <class Element>
void fold_part(const std::uint8_t* data, const FoldStrip& strip, const std::uint8_t* ahead,
               const std::uint32_t* signs, std::size_t move, float* buckets,
               double* squares) noexcept {
    const V::Words words[2] = {V::load_words(signs), V::load_words(signs + kSimLanes)};
    const V::Move lane_move = V::make_move(move % kSimLanes);
    const std::size_t group_move = move / kSimLanes;
    V::Reg strip_squares = V::zero();
    for (std::size_t g = 0; g < kFoldGroups; ++g) {
        const std::size_t t = g ^ group_move;
        if (t >= strip.groups) continue;
        const std::uint8_t* at = data + strip.offset[t];
        __builtin_prefetch(ahead + strip.offset[t], 0, 2);
        const V::Reg x = V::move(to_f32(Element::value_n(at, strip.lanes[t])), lane_move);
        const V::Reg signed_x = V::flip(x, V::shift(words[g / 32], g % 32));
        float* bucket = buckets + g * kSimLanes;
        V::store(bucket, V::add(V::load(bucket), signed_x));
        strip_squares = V::add(strip_squares, V::mul(x, x));
    }
    add_to(squares, strip_squares);
}

template <class Element>
void fold(const std::uint8_t* data, const FoldStrip& strip, std::size_t strips, std::size_t pitch,
          const std::uint8_t* ahead, const std::uint32_t* signs, const std::uint16_t* moves,
          float* buckets, double* squares) noexcept {
    std::size_t s = 0;
    if (strip.full) {
        for (; s + V::kFoldStrips <= strips; s += V::kFoldStrips) {
            fold_full<Element, V::kFoldStrips>(data + s * pitch, strip, pitch, ahead + s * pitch,
                                               signs + s * kSignWords, moves + s, buckets, squares);
        }
    }
    for (; s < strips; ++s) {
        fold_part<Element>(data + s * pitch, strip, ahead + s * pitch, signs + s * kSignWords,
                           moves[s], buckets, squares);
    }
}

// ---- Walsh-Hadamard transforms ------------------------------------------------------------------

[[gnu::always_inline]] inline void cross(V::Reg& a, V::Reg& b) noexcept {
    const V::Reg sum = V::add(a, b);
    b = V::sub(a, b);
    a = sum;
}

[[gnu::always_inline]] inline V::Reg cross_lanes(V::Reg x) noexcept {
    x = V::butterfly<1>(x);
    x = V::butterfly<2>(x);
    x = V::butterfly<4>(x);
    return V::butterfly<8>(x);
}

// Butterflies A, 2 A and 4 A groups apart on r[i], which are groups i * A apart.
[[gnu::always_inline]] inline void cross8(V::Reg* r) noexcept {
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 8; i += 2) cross(r[i], r[i + 1]);
    cross(r[0], r[2]);
    cross(r[1], r[3]);
    cross(r[4], r[6]);
    cross(r[5], r[7]);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) cross(r[i], r[i + 4]);
}

// The last step: groups 8, 16 and 32 apart, signs, and of the next transform the sums that leave
// `Kept` of 8 groups.
template <std::size_t Kept>
void mix_far(float* x, const std::uint32_t* signs) noexcept {
    for (std::size_t g = 0; g < 8; ++g) {
        V::Reg r[8];
#pragma GCC unroll 8
        for (std::size_t i = 0; i < 8; ++i) r[i] = V::load(x + (g + 8 * i) * kSimLanes);
        cross8(r);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < 8; ++i) {
            const std::size_t at = g + 8 * i;
            const auto words = V::load_words(signs + at / 32 * kSimLanes);
            r[i] = V::flip(r[i], V::shift(words, at % 32));
        }
#pragma GCC unroll 3
        for (std::size_t left = 4; left >= Kept; left /= 2) {
            for (std::size_t i = 0; i < left; ++i) r[i] = V::add(r[i], r[i + left]);
        }
#pragma GCC unroll 4
        for (std::size_t i = 0; i < Kept; ++i) V::store(x + (g + 8 * i) * kSimLanes, r[i]);
    }
}

void mix(float* buckets, const std::uint32_t* signs, std::size_t outputs, float* out) noexcept {
    for (std::size_t g = 0; g < 8; ++g) {
        V::Reg r[8];
#pragma GCC unroll 8
        for (std::size_t i = 0; i < 8; ++i) r[i] = V::load(buckets + (g + 8 * i) * kSimLanes);
        cross8(r);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < 8; ++i) V::store(buckets + (g + 8 * i) * kSimLanes, r[i]);
    }
    // The end of the first transform and the beginning of the second are on the same groups.
    for (std::size_t g = 0; g < kFoldGroups; g += 8) {
        V::Reg r[8];
        const auto words = V::shift(V::load_words(signs + g / 32 * kSimLanes), g % 32);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < 8; ++i) r[i] = V::load(buckets + (g + i) * kSimLanes);
        cross8(r);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < 8; ++i) r[i] = V::flip(r[i], V::shift(words, i));
        cross8(r);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < 8; ++i) {
            V::store(buckets + (g + i) * kSimLanes, cross_lanes(r[i]));
        }
    }
    if (outputs <= 128) {
        mix_far<1>(buckets, signs + kSignWords);
    } else if (outputs == 256) {
        mix_far<2>(buckets, signs + kSignWords);
    } else {
        mix_far<4>(buckets, signs + kSignWords);
    }
    if (outputs == 64) {
        for (std::size_t i = 0; i < outputs; i += kSimLanes) {
            V::store(buckets + i, V::add(V::load(buckets + i), V::load(buckets + i + outputs)));
        }
    }
    for (std::size_t apart = outputs / 2; apart >= kSimLanes; apart /= 2) {
        for (std::size_t i = 0; i < outputs; i += kSimLanes) {
            if ((i & apart) != 0) continue;
            V::Reg a = V::load(buckets + i);
            V::Reg b = V::load(buckets + i + apart);
            cross(a, b);
            V::store(buckets + i, a);
            V::store(buckets + i + apart, b);
        }
    }
    for (std::size_t i = 0; i < outputs; i += kSimLanes) {
        V::store(out + i, cross_lanes(V::load(buckets + i)));
    }
}

// ---- comparing ----------------------------------------------------------------------------------

// Squares, summed per lane: in the type of the values over a chunk, then in f64.
template <class Num>
struct Sums {
    typename Num::Reg part = Num::zero();
    D::Reg whole = D::zero();

    void add(const typename Num::Reg& x) noexcept { part = Num::add(part, Num::mul(x, x)); }
    void end_chunk() noexcept {
        whole = D::add(whole, to_f64(part));
        part = Num::zero();
    }
};

template <class Element>
void compare(const std::uint8_t* a, std::size_t a_stride, const std::uint8_t* b,
             std::size_t b_stride, std::size_t rows, std::size_t cols, double eps, double limit,
             Comparison& out) noexcept {
    using Num = typename Element::Num;
    using Reg = typename Num::Reg;
    const Reg close = Num::set1(eps);
    Sums<Num> squares;
    Sums<Num> differences;
    Reg greatest = Num::zero();
    std::uint64_t within = 0;
    std::size_t groups = 0;
    double total = 0;
    for (std::size_t r = 0; r < rows && !(total > limit); ++r, a += a_stride, b += b_stride) {
        for (std::size_t c = 0; c < cols; c += kSimLanes) {
            const std::uint8_t* left_at = a + c * Element::kBytes;
            const std::uint8_t* right_at = b + c * Element::kBytes;
            const std::size_t n = cols - c;
            Reg left;
            Reg difference;
            if (n >= kSimLanes) {
                left = Element::value(left_at);
                difference = Num::sub(left, Element::value(right_at));
            } else {
                left = Element::value_n(left_at, n);
                difference = Num::sub(left, Element::value_n(right_at, n));
            }
            const Reg size = Num::abs(difference);
            squares.add(left);
            differences.add(difference);
            greatest = Num::greatest(size, greatest);
            within += Num::count_within(size, close, n < kSimLanes ? n : kSimLanes);
            if (++groups != kFoldGroups) continue;
            groups = 0;
            squares.end_chunk();
            differences.end_chunk();
            total = D::total(differences.whole);
            if (total > limit) break;
        }
    }
    squares.end_chunk();
    differences.end_chunk();
    out.squares = D::total(squares.whole);
    out.squared_difference = D::total(differences.whole);
    out.greatest_difference = Num::max_of(greatest);
    out.within = within;
}

template <class Element>
double sum_squares(const std::uint8_t* data, std::size_t stride, std::size_t rows,
                   std::size_t cols) noexcept {
    Sums<typename Element::Num> squares;
    std::size_t groups = 0;
    for (std::size_t r = 0; r < rows; ++r, data += stride) {
        for (std::size_t c = 0; c < cols; c += kSimLanes) {
            const std::uint8_t* at = data + c * Element::kBytes;
            squares.add(cols - c >= kSimLanes ? Element::value(at)
                                              : Element::value_n(at, cols - c));
            if (++groups != kFoldGroups) continue;
            groups = 0;
            squares.end_chunk();
        }
    }
    squares.end_chunk();
    return D::total(squares.whole);
}

// ---- selection ----------------------------------------------------------------------------------

// The bits of a magnitude, as they are.
template <class Element, class Key>
void keys_of(const std::uint8_t* data, std::size_t count, Key* to) noexcept {
    using Num = typename Element::Num;
    std::size_t i = 0;
    for (; i + kSimLanes <= count; i += kSimLanes) {
        Num::store_any(to + i, Num::abs(Element::value(data + i * Element::kBytes)));
    }
    if (i < count) {
        Key rest[kSimLanes];
        Num::store_any(rest, Num::abs(Element::value_n(data + i * Element::kBytes, count - i)));
        __builtin_memcpy(to + i, rest, (count - i) * sizeof(Key));
    }
}

// Keys: Key, kLanes, Reg; load, set1 (of keys, biased where the compare is signed), and
// below(a, b): how many lanes of a are less than those of b; store_between(x, low, high, out,
// below) appends the lanes in [low, high) to out and returns how many; min.

template <class Keys>
std::size_t count_below(const typename Keys::Key* keys, std::size_t count,
                        typename Keys::Key pivot) noexcept {
    const typename Keys::Reg limit = Keys::set1(pivot);
    std::size_t below = 0;
    std::size_t i = 0;
    for (; i + 2 * Keys::kLanes <= count; i += 2 * Keys::kLanes) {
        below += Keys::below(Keys::load(keys + i), limit);
        below += Keys::below(Keys::load(keys + i + Keys::kLanes), limit);
    }
    for (; i < count; ++i) below += keys[i] < pivot ? 1 : 0;
    return below;
}

template <class Keys>
Filtered filter(const typename Keys::Key* keys, std::size_t count, typename Keys::Key low,
                typename Keys::Key high, typename Keys::Key* out) noexcept {
    const typename Keys::Reg from = Keys::set1(low);
    const typename Keys::Reg to = Keys::set1(high);
    Filtered found{0, 0};
    std::size_t i = 0;
    for (; i + Keys::kLanes <= count; i += Keys::kLanes) {
        found.kept += Keys::store_between(keys + i, from, to, out + found.kept, found.below);
    }
    for (; i < count; ++i) {
        const typename Keys::Key key = keys[i];
        if (key < low) {
            ++found.below;
        } else if (key < high) {
            out[found.kept++] = key;
        }
    }
    return found;
}

// Not worth registers: it runs once per block, on what a filter left.
template <class Key>
Key next_above(const Key* keys, std::size_t count, Key pivot) noexcept {
    Key next = ~Key{0};
    for (std::size_t i = 0; i < count; ++i) {
        const Key key = keys[i] > pivot ? keys[i] : ~Key{0};
        next = key < next ? key : next;
    }
    return next;
}

template <class Element>
constexpr ElementKernels kElement = {fold<Element>, compare<Element>, sum_squares<Element>};

template <class Keys>
constexpr SelectKernels<typename Keys::Key> kSelect = {count_below<Keys>, filter<Keys>,
                                                       next_above<typename Keys::Key>};

constexpr SimilarityKernels kSimilarity = {
    kElement<F32>, kElement<F64>,   kElement<F16>,   kElement<Bf16>,
    mix,           sketch_distance, keys_of<F32>,    keys_of<F16>,
    keys_of<Bf16>, keys_of<F64>,    kSelect<Keys32>, kSelect<Keys64>,
};
