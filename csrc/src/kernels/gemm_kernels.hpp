// SPDX-License-Identifier: Apache-2.0
// Kernels of the streaming matrix product. A block w is rows x cols, row-major, where it lies in
// its page or in a scratch tile; leading dimensions are in elements. All kernels add to their
// output.
//
// Two shapes of work, x @ W.T (nt) and x @ W (nn), and for nt two ways:
//   dot_nt    few rows of x: vectors run along the columns of w; w is read once, at memory speed.
//   tile_nt   more rows of x: x was packed so that vectors run along its rows, and each element of
//             w is broadcast from where it lies. So w is never packed, only x is, once per product.
//             With fewer rows than lanes, a group of neighbouring columns lies side by side: then
//             one read of w brings a group of its elements, and serves as many products as before.
// Sums are not bit-stable across kernels (FMA, other lane counts): results are never persisted.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pydedup {

inline constexpr std::size_t kMaxGemmTiles = 6;

// More do not pay: x of so many, with what fills it up to whole registers, has to stay in the
// first-level cache (AMX, blocks of 16 x 16: 24 take half as long again).
inline constexpr std::size_t kMaxGemmPieces = 6;

/// What is needed next: of blocks, and of packed x. Each is [begin, end), and need not exist.
template <class E>
struct GemmNext {
    const E* w = nullptr;
    const E* w_end = nullptr;
    const E* x = nullptr;
    const E* x_end = nullptr;
};

/// A block w of `cols` columns, and the columns of packed x that it is multiplied with. Unless
/// nullptr, as many elements as it has are prefetched from `next` on (need not exist).
template <class E>
struct GemmPiece {
    const E* x;
    const E* w;
    std::size_t cols, ldw;
    const E* next;
};

/// How a tile of rows of x, elements E, is multiplied with a block; summed in A.
template <class E, class A>
struct GemmTile {
    std::size_t width;  ///< rows of x in one tile; 0 ends a list
    /// Adds to acc (rows x width x sums()) what it makes of x (ceil(cols / group) x width x group,
    /// filled up with zeros):
    ///   acc[r, i, j] += sum over c with c % group / per_sum = j of x[c / group, i, c % group]
    ///                   * w[r, c]
    /// in the order of c. The sum over j is the caller's, after the last block. What is `next` is
    /// prefetched meanwhile.
    void (*tile_nt)(const E* x, const E* w, std::size_t rows, std::size_t cols, std::size_t ldw,
                    const GemmNext<E>& next, A* acc) noexcept;
    std::size_t group = 1;    ///< neighbouring columns that lie beside each other in a vector
    std::size_t per_sum = 1;  ///< of them, neighbours that are added up at once; divides group
    /// tile_nt for up to kMaxGemmPieces blocks of as many rows, one after another, while the sums
    /// stay in registers; these start with acc, or `anew`. nullptr where that gains nothing.
    void (*tile_nt_pieces)(const GemmPiece<E>* pieces, std::size_t count, std::size_t rows,
                           bool anew, A* acc) noexcept = nullptr;
    /// tile_nt of f32 numbers, each in three parts: x, as pack_cut leaves it, and w from a multiple
    /// of kCutColumns columns on, as cut_block leaves it. Products of two parts that are both below
    /// the first, but for the middle ones, do not count: they are below 2^-24 of all. What is next
    /// of x has parts as well. nullptr where one product of f32 takes no longer.
    void (*tile_nt_cut)(const E* x, std::size_t x_part, const E* w, std::size_t w_part,
                        std::size_t rows, std::size_t cols, const GemmNext<E>& next,
                        A* acc) noexcept = nullptr;

    [[nodiscard]] constexpr std::size_t sums() const noexcept { return group / per_sum; }
};

template <class T>
struct GemmKernelsOf {
    /// y[i, r] += sum over c of x[i, c] * w[r, c], for i < m.
    void (*dot_nt)(const T* x, std::size_t ldx, std::size_t m, const T* w, std::size_t rows,
                   std::size_t cols, std::size_t ldw, T* y, std::size_t ldy) noexcept;
    /// y[i, c] += sum over r of x[i, r] * w[r, c], for i < m.
    void (*block_nn)(const T* x, std::size_t ldx, std::size_t m, const T* w, std::size_t rows,
                     std::size_t cols, std::size_t ldw, T* y, std::size_t ldy) noexcept;
    using Tile = GemmTile<T, T>;
    Tile tiles[kMaxGemmTiles];  ///< widest first
    std::size_t dot_max_m;      ///< up to this m dot_nt is the faster way (measured)
};

/// A block of f32 numbers, cut into bf16 numbers, is filled up with zeros to so many rows and
/// columns; so many columns lie together.
inline constexpr std::size_t kCutRows = 16;
inline constexpr std::size_t kCutColumns = 32;

/// Numbers are cut whose largest magnitude is zero, or within these bounds (the bits of 2^-90 and
/// 2^60). From the upper one on an instruction's products of lower parts might be infinite with the
/// other sign, which gives NaN; below the lower one parts are subnormal, and count as zero.
inline constexpr std::uint32_t kLeastToCut = (127U - 90U) << 23;
inline constexpr std::uint32_t kTooLargeToCut = (127U + 60U) << 23;

/// Elements of each part of a block that is cut.
[[nodiscard]] constexpr std::size_t cut_elements(std::size_t rows, std::size_t cols) noexcept {
    return (rows + kCutRows - 1) / kCutRows * kCutRows *
           ((cols + kCutColumns - 1) / kCutColumns * kCutColumns);
}

/// Up to 32 lanes of pairs. In lane i the first of a pair is the element first + i * stride of an
/// array, the second one second + i * stride, where that bit of has_first and has_second is set;
/// else it is zero. Only bits of `lanes`, which are the lowest, are set.
struct PairRun {
    std::ptrdiff_t first, second;
    std::size_t to;
    std::uint32_t has_first, has_second, lanes;
};

/// kTurnedRows rows of x, bf16 numbers as they lie, by W in `tiles`, each of as many rows of W and
/// all columns, as pack_pairs leaves them (ld_to = 2 * kTurnedRows), filled up with zeros to a
/// multiple of kCutColumns columns; `step` elements after one is the next.
inline constexpr std::size_t kTurnedRows = 32;
struct TurnedRows {
    const std::uint16_t* x;
    std::size_t ldx, cols;
    const std::uint16_t* w;
    std::size_t tiles, step;
    const float* bias;          ///< of each row of W, or nullptr
    const std::uint16_t* next;  ///< as many rows of x, to be asked for meanwhile, or nullptr
};

/// f32 numbers cut into bf16 numbers: of each kCutColumns columns, filled up with zeros, the three
/// parts one after another, so many elements in all. A part of up to kTurnedRows rows of x has all
/// columns of a row together; one of a tile of as many rows of W is as pack_cut leaves it (ld_to =
/// 2
/// * kTurnedRows).
inline constexpr std::size_t kTurnedCutStep = 3 * kTurnedRows * kCutColumns;
/// Rows of x to be cut so.
struct RowsToCut {
    const float* x;
    std::size_t ldx, rows, cols;
    std::uint16_t* to;
};
/// Rows of x by tiles of W, both cut so.
struct TurnedCut {
    const std::uint16_t* x;
    const std::uint16_t* w;     ///< one tile after another
    std::size_t rows, columns;  ///< of y; the latter are rows of W
    bool anew;                  ///< else sums begin with y
    const float* bias;          ///< of each row of W, or nullptr
    RowsToCut next;             ///< to be cut meanwhile, of as many columns; may be no rows
};

/// Products of bf16 numbers with bf16 numbers. A number below 2^-126 counts as zero.
struct Bf16GemmKernels {
    GemmTile<std::uint16_t, float> tiles[kMaxGemmTiles];  ///< widest first; may be none
    /// Cuts each of x (count), zero, not finite or at least 2^-94, into three bf16 numbers (as f32)
    /// that add up to it: the 24 bits of a significand are three times the 8 of bf16. All have the
    /// sign of the number, and are zero only if it is: where nothing is left, a part is 2^-32 of
    /// the number, which f32 does not tell apart. So what is infinite times the number is infinite
    /// times each part, never NaN. Of a number that is not finite, each part is the number.
    /// nullptr where three of these products take longer than one in f32 (measured).
    void (*cut)(const float* x, std::size_t count, float* high, float* middle,
                float* low) noexcept = nullptr;
    /// A thread calls these before its first tile and after its last one: they set up, and give
    /// back, registers that nothing else uses meanwhile. nullptr where there are none.
    void (*enter)() noexcept = nullptr;
    void (*leave)() noexcept = nullptr;
    /// Of bf16 numbers, pairs of columns side by side in rows: to[c / 2 * ld_to + 2 * r + c % 2] of
    /// x[r * ldx + c], for r < rows and c < cols; zero where the last column has no other. Whether
    /// any of them is subnormal.
    bool (*pack_pairs)(const std::uint16_t* x, std::size_t ldx, std::size_t rows, std::size_t cols,
                       std::uint16_t* to, std::size_t ld_to) noexcept = nullptr;
    /// Sums with rows and columns exchanged: dst[c * ld_dst + r] of src[r * ld_src + c], for
    /// r < rows and c < cols.
    void (*columns_to_f32)(const float* src, std::size_t ld_src, std::size_t rows, std::size_t cols,
                           float* dst, std::size_t ld_dst) noexcept = nullptr;
    /// The same of src[r * ld_src + c] + bias[r], unless that is nullptr, rounded as by
    /// f32_to_bf16. These and pack_pairs are there where there are tiles.
    void (*columns_to_bf16)(const float* src, std::size_t ld_src, std::size_t rows,
                            std::size_t cols, const float* bias, std::uint16_t* dst,
                            std::size_t ld_dst) noexcept = nullptr;
    /// dst[r * ld_dst + c] of src[r * ld_src + c] + bias[c], for r < rows and c < cols, otherwise
    /// so.
    void (*rows_to_bf16)(const float* src, std::size_t ld_src, std::size_t rows, std::size_t cols,
                         const float* bias, std::uint16_t* dst,
                         std::size_t ld_dst) noexcept = nullptr;
    /// For k < times all runs: those of `from` + k * ld, to the elements from `to` + k * ld_to +
    /// run.to on. There where pack_pairs is.
    void (*copy_pairs)(const std::uint16_t* from, std::size_t stride, std::size_t ld,
                       std::size_t times, const PairRun* runs, std::size_t n, std::uint16_t* to,
                       std::size_t ld_to) noexcept = nullptr;
    /// pack_pairs of f32 numbers, each cut into three bf16 numbers that are `part` elements apart:
    /// two are what is left, rounded (half way away from zero), and the last is what is left then,
    /// truncated: nothing is lost of a number of 2^-110 or more. Up to 32 rows: a bit of the result
    /// for each that is not cut (kLeastToCut; not finite numbers are too large); it is packed as
    /// zeros. This and the next two are there where tile_nt_cut is.
    std::uint32_t (*pack_cut)(const float* x, std::size_t ldx, std::size_t rows, std::size_t cols,
                              std::uint16_t* to, std::size_t part,
                              std::size_t ld_to) noexcept = nullptr;
    /// The same of columns of 32 lanes each, lane i of column c at x[32 * c + i]: a lane is what a
    /// row is there; to[c / 2 * 64 + 2 * i + c % 2].
    std::uint32_t (*pair_cut)(const float* x, std::size_t cols, std::uint16_t* to,
                              std::size_t part) noexcept = nullptr;
    /// Cuts a block w the same way. Of each of the three parts, cut_elements(rows, cols) elements
    /// after the one before, kCutColumns columns of all rows come after another. False, and nothing
    /// of use, where a row of all of its numbers would not be cut.
    bool (*cut_block)(const float* w, std::size_t rows, std::size_t cols, std::size_t ldw,
                      std::uint16_t* to) noexcept = nullptr;
    /// y[i * ld + r] of x's row i by W's row r, plus bias, summed as by tile_nt; in bf16 rounded as
    /// by f32_to_bf16. Whether any of x is subnormal; then y is of no use. nullptr where tile_nt is
    /// as fast.
    bool (*turned_to_bf16)(const TurnedRows& rows, std::uint16_t* y,
                           std::size_t ld) noexcept = nullptr;
    bool (*turned_to_f32)(const TurnedRows& rows, float* y, std::size_t ld) noexcept = nullptr;
    /// Cuts rows of x, as pack_cut does. False, and nothing of use, where kCutColumns neighbours in
    /// a row would not be cut.
    bool (*cut_strip)(const RowsToCut& rows) noexcept = nullptr;
    /// y[i * ld + r] of x's row i by W's row r, plus bias, summed as by tile_nt_cut. What cut_strip
    /// gives for the next rows.
    bool (*turned_cut)(const TurnedCut& given, float* y, std::size_t ld) noexcept = nullptr;
};

struct GemmKernels {
    GemmKernelsOf<float> f32;
    GemmKernelsOf<double> f64;
    /// dot_nt with w in 16-bit floats, widened as it is read.
    void (*dot_nt_bf16)(const float* x, std::size_t ldx, std::size_t m, const std::uint16_t* w,
                        std::size_t rows, std::size_t cols, std::size_t ldw, float* y,
                        std::size_t ldy) noexcept;
    void (*dot_nt_f16)(const float* x, std::size_t ldx, std::size_t m, const std::uint16_t* w,
                       std::size_t rows, std::size_t cols, std::size_t ldw, float* y,
                       std::size_t ldy) noexcept;
    void (*bf16_to_f32)(const std::uint16_t* src, std::size_t count, float* dst) noexcept;
    void (*f16_to_f32)(const std::uint16_t* src, std::size_t count, float* dst) noexcept;
    /// Rounds to nearest, ties to even; a NaN stays one.
    void (*f32_to_bf16)(const float* src, std::size_t count, std::uint16_t* dst) noexcept;
    Bf16GemmKernels bf16{};  ///< none where the CPU has no such instruction
};

}  // namespace pydedup
