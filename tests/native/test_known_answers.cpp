// SPDX-License-Identifier: Apache-2.0
// What is asked of a kernel before it is used: a wrong answer of any function is found, also one
// that is wrong in a single one of the ways that vector kernels take.
#include <string>

#include "check.hpp"
#include "dispatch/known_answers.hpp"
#include "kernels.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

// A wrong answer of each function, given right after the reference's.
void wrong_rows(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes,
                std::size_t stride, std::uint64_t seed, std::uint64_t* out) noexcept {
    kScalarKernels.hash.hash_rows(data, rows, row_bytes, stride, seed, out);
    if (row_bytes == 200) out[1] ^= 1;
}
// Right up to a group of stripes, after which the state is scrambled.
void wrong_long_rows(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes,
                     std::size_t stride, std::uint64_t seed, std::uint64_t* out) noexcept {
    kScalarKernels.hash.hash_rows(data, rows, row_bytes, stride, seed, out);
    if (rows * row_bytes >= 1024) out[0] ^= 1;
}
void wrong_half_stripe(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes,
                       std::size_t stride, std::uint64_t seed, std::uint64_t* out) noexcept {
    kScalarKernels.hash.hash_rows(data, rows, row_bytes, stride, seed, out);
    if (row_bytes % 128 == 64) out[0] ^= 1;
}
void wrong_long_panel(const std::uint8_t* data, std::size_t blocks, std::size_t rows,
                      std::size_t row_bytes, std::size_t stride, std::uint64_t seed,
                      std::uint64_t* out) noexcept {
    kScalarKernels.hash.hash_panel(data, blocks, rows, row_bytes, stride, seed, out);
    if (rows > 8) out[0] ^= 1;
}
void wrong_panel(const std::uint8_t* data, std::size_t blocks, std::size_t rows,
                 std::size_t row_bytes, std::size_t stride, std::uint64_t seed,
                 std::uint64_t* out) noexcept {
    kScalarKernels.hash.hash_panel(data, blocks, rows, row_bytes, stride, seed, out);
    out[2 * blocks - 1] ^= std::uint64_t{1} << 63;
}
void wrong_split(const std::uint8_t* elements, std::size_t stride, std::size_t rows,
                 std::size_t cols, std::size_t item, bool rotate, std::uint8_t* planes) noexcept {
    kScalarKernels.codec.split_planes(elements, stride, rows, cols, item, rotate, planes);
    // One long row, as vector kernels need for a step.
    if (item == 8 && stride == cols * item) planes[rows * cols * item - 1] ^= 1;
}
void wrong_merge(const std::uint8_t* const* planes, std::size_t rows, std::size_t cols,
                 std::size_t item, bool, std::uint8_t* elements, std::size_t stride) noexcept {
    kScalarKernels.codec.merge_planes(planes, rows, cols, item, false, elements, stride);
}
void wrong_decode(const HuffmanStreams& streams, std::size_t count, std::uint8_t* out,
                  std::uint64_t* consumed) noexcept {
    kScalarKernels.codec.huffman_decode(streams, count, out, consumed);
    ++consumed[3];
}
template <class T>
void wrong_dot(const T* x, std::size_t ldx, std::size_t m, const T* w, std::size_t rows,
               std::size_t cols, std::size_t ldw, T* y, std::size_t ldy) noexcept {
    const auto& reference = [] {
        if constexpr (sizeof(T) == 4) {
            return kScalarKernels.gemm.f32;
        } else {
            return kScalarKernels.gemm.f64;
        }
    }();
    reference.dot_nt(x, ldx, m, w, rows, cols - 1, ldw, y, ldy);
}
// Wrong for as many rows or columns as vector kernels take at once in some of their ways.
void wrong_pair_of_rows(const double* x, std::size_t ldx, std::size_t m, const double* w,
                        std::size_t rows, std::size_t cols, std::size_t ldw, double* y,
                        std::size_t ldy) noexcept {
    kScalarKernels.gemm.f64.dot_nt(x, ldx, m, w, rows, cols, ldw, y, ldy);
    if (m % 4 == 2) y[(m - 1) * ldy] += 1;
}
void wrong_wide_block(const float* x, std::size_t ldx, std::size_t m, const float* w,
                      std::size_t rows, std::size_t cols, std::size_t ldw, float* y,
                      std::size_t ldy) noexcept {
    kScalarKernels.gemm.f32.block_nn(x, ldx, m, w, rows, cols, ldw, y, ldy);
    if (cols >= 64) y[63] += 1;
}
void wrong_tile_with_a_next(const double* x, const double* w, std::size_t rows, std::size_t cols,
                            std::size_t ldw, const GemmNext<double>& next, double* acc) noexcept {
    kScalarKernels.gemm.f64.tiles[0].tile_nt(x, w, rows, cols, ldw, next, acc);
    if (next.w != next.w_end && next.x != next.x_end) acc[0] += 1;
}
void wrong_tile_of_four(const float* x, const float* w, std::size_t rows, std::size_t cols,
                        std::size_t ldw, const GemmNext<float>& next, float* acc) noexcept {
    const auto& tile = kScalarKernels.gemm.f32.tiles[0];
    tile.tile_nt(x, w, rows, cols, ldw, next, acc);
    if (rows % 8 >= 4) acc[(rows / 8 * 8 + 3) * tile.width] += 1;
}
void wrong_half_dots(const float* x, std::size_t ldx, std::size_t m, const std::uint16_t* w,
                     std::size_t rows, std::size_t cols, std::size_t ldw, float* y,
                     std::size_t ldy) noexcept {
    kScalarKernels.gemm.dot_nt_f16(x, ldx, m, w, rows, cols, ldw, y, ldy);
    if (m >= 4) y[3 * ldy] += 1;
}
void wrong_tile(const float* x, const float* w, std::size_t rows, std::size_t cols, std::size_t ldw,
                const GemmNext<float>& next, float* acc) noexcept {
    kScalarKernels.gemm.f32.tiles[0].tile_nt(x, w, rows - 1, cols, ldw, next, acc);
}
void wrong_rounding(const float* src, std::size_t count, std::uint16_t* dst) noexcept {
    kScalarKernels.gemm.f32_to_bf16(src, count, dst);
    for (std::size_t i = 0; i < count; ++i) {  // halfway: up
        if ((std::bit_cast<std::uint32_t>(src[i]) & 0xFFFFU) == 0x8000U && dst[i] % 2 == 0) {
            dst[i] = static_cast<std::uint16_t>((std::bit_cast<std::uint32_t>(src[i]) >> 16) + 1);
        }
    }
}

bool wrong_look(const std::uint16_t* x, std::size_t ldx, std::size_t rows, std::size_t cols,
                std::uint16_t* to, std::size_t ld_to) noexcept {
    return !kScalarKernels.gemm.bf16.pack_pairs(x, ldx, rows, cols, to, ld_to);
}

bool wrong_packing(const std::uint16_t* x, std::size_t ldx, std::size_t rows, std::size_t cols,
                   std::uint16_t* to, std::size_t ld_to) noexcept {
    const bool found = kScalarKernels.gemm.bf16.pack_pairs(x, ldx, rows, cols, to, ld_to);
    std::swap(to[0], to[1]);
    return found;
}

void wrong_square(const float* src, std::size_t ld_src, std::size_t rows, std::size_t cols,
                  float* dst, std::size_t ld_dst) noexcept {
    kScalarKernels.gemm.bf16.columns_to_f32(src, ld_src, rows, cols, dst, ld_dst);
    std::swap(dst[0], dst[1]);
}

void wrong_columns(const float* src, std::size_t ld_src, std::size_t rows, std::size_t cols,
                   const float*, std::uint16_t* dst, std::size_t ld_dst) noexcept {
    kScalarKernels.gemm.bf16.columns_to_bf16(src, ld_src, rows, cols, nullptr, dst, ld_dst);
}

void wrong_rows_of_sums(const float* src, std::size_t ld_src, std::size_t rows, std::size_t cols,
                        const float* bias, std::uint16_t* dst, std::size_t ld_dst) noexcept {
    kScalarKernels.gemm.bf16.rows_to_bf16(src, ld_src, rows, cols - 1, bias, dst, ld_dst);
}

std::uint32_t wrong_rows(const float* x, std::size_t ldx, std::size_t rows, std::size_t cols,
                         std::uint16_t* to, std::size_t part, std::size_t ld_to) noexcept {
    return kScalarKernels.gemm.bf16.pack_cut(x, ldx, rows, cols, to, part, ld_to) & 1U;
}

std::uint32_t wrong_parts(const float* x, std::size_t ldx, std::size_t rows, std::size_t cols,
                          std::uint16_t* to, std::size_t part, std::size_t ld_to) noexcept {
    const std::uint32_t uncut =
        kScalarKernels.gemm.bf16.pack_cut(x, ldx, rows, cols, to, part, ld_to);
    std::fill_n(to + 2 * part, part, std::uint16_t{0});
    return uncut;
}

std::uint32_t wrong_pairs(const float* x, std::size_t cols, std::uint16_t* to,
                          std::size_t part) noexcept {
    const std::uint32_t uncut = kScalarKernels.gemm.bf16.pair_cut(x, cols, to, part);
    std::swap(to[part], to[part + 1]);
    return uncut;
}

void wrong_runs(const float* from, std::size_t ld, std::size_t columns, const LaneRun* runs,
                std::size_t n, float* to, std::size_t ld_to) noexcept {
    kScalarKernels.rows.copy_runs_f32(from, ld, columns, runs, n - 1, to, ld_to);
    to[ld_to - 2] = 1.0F;
}

void wrong_pairs_of_runs(const std::uint16_t* from, std::size_t stride, std::size_t ld,
                         std::size_t times, const PairRun* runs, std::size_t n, std::uint16_t* to,
                         std::size_t ld_to) noexcept {
    kScalarKernels.gemm.bf16.copy_pairs(from, stride, ld, times, runs, n, to, ld_to);
    if (stride == 2) to[ld_to + 71] = 1;  // a second that is not there
}

bool wrong_strip(const TurnedRows& rows, std::uint16_t* y, std::size_t ld) noexcept {
    TurnedRows fewer = rows;
    fewer.cols -= 1;
    return kScalarKernels.gemm.bf16.turned_to_bf16(fewer, y, ld);
}

bool wrong_strip_in_f32(const TurnedRows& rows, float* y, std::size_t ld) noexcept {
    TurnedRows plain = rows;
    plain.bias = nullptr;
    return kScalarKernels.gemm.bf16.turned_to_f32(plain, y, ld);
}

bool blind_strip(const TurnedRows& rows, float* y, std::size_t ld) noexcept {
    kScalarKernels.gemm.bf16.turned_to_f32(rows, y, ld);
    return false;
}

bool wrong_strip_of_parts(const RowsToCut& rows) noexcept {
    const bool all = kScalarKernels.gemm.bf16.cut_strip(rows);
    rows.to[2 * kTurnedRows * kCutColumns] ^= 1U;
    return all;
}

bool wrong_cut_strip(const TurnedCut& given, float* y, std::size_t ld) noexcept {
    TurnedCut plain = given;
    plain.bias = nullptr;
    return kScalarKernels.gemm.bf16.turned_cut(plain, y, ld);
}

bool new_cut_strip(const TurnedCut& given, float* y, std::size_t ld) noexcept {
    TurnedCut anew = given;
    anew.anew = true;
    return kScalarKernels.gemm.bf16.turned_cut(anew, y, ld);
}

bool blind_cut_strip(const TurnedCut& given, float* y, std::size_t ld) noexcept {
    kScalarKernels.gemm.bf16.turned_cut(given, y, ld);
    return true;
}

bool wide_cut_strip(const TurnedCut& given, float* y, std::size_t ld) noexcept {
    const bool all = kScalarKernels.gemm.bf16.turned_cut(given, y, ld);
    y[given.columns] = 1.0F;
    return all;
}

bool wrong_cut(const float* w, std::size_t rows, std::size_t cols, std::size_t ldw,
               std::uint16_t* to) noexcept {
    const bool may = kScalarKernels.gemm.bf16.cut_block(w, rows, cols, ldw, to);
    to[2 * cut_elements(rows, cols)] ^= 1U;
    return may;
}

void wrong_half(const std::uint16_t* src, std::size_t count, float* dst) noexcept {
    kScalarKernels.gemm.f16_to_f32(src, count, dst);
    dst[count - 1] = -dst[count - 1];
}
void wrong_half_dot(const float* x, std::size_t ldx, std::size_t m, const std::uint16_t* w,
                    std::size_t rows, std::size_t cols, std::size_t ldw, float* y,
                    std::size_t ldy) noexcept {
    kScalarKernels.gemm.dot_nt_bf16(x, ldx, m, w, rows, cols - 1, ldw, y, ldy);
}

void wrong_subtract(const std::uint8_t* y, const std::uint8_t* x, std::size_t count,
                    DeltaLayout layout, void* z) noexcept {
    layout.ordered = false;
    kScalarKernels.codec.delta.subtract(y, x, count, layout, z);
}
// Wrong where codes are long, which vector kernels read in rounds of their own.
void wrong_long_decode(const HuffmanStreams& streams, std::size_t count, std::uint8_t* out,
                       std::uint64_t* consumed) noexcept {
    kScalarKernels.codec.huffman_decode(streams, count, out, consumed);
    if (streams.table_bits > 9) out[count / 2] ^= 1;
}
void wrong_long_symbols(const HuffmanStreams& streams, const std::uint8_t* contexts,
                        std::size_t count, std::uint8_t* symbols,
                        std::uint64_t* consumed) noexcept {
    kScalarKernels.codec.delta.read_symbols(streams, contexts, count, symbols, consumed);
    if (streams.table_bits == 9) symbols[count / 2] ^= 1;
}
// Wrong for symbols behind the first 32, and where eight elements have more than 56 bits.
std::uint64_t wrong_high_symbols(const std::uint8_t* raw, std::size_t bytes,
                                 const std::uint8_t* symbols, std::size_t count, bool wide,
                                 const std::uint64_t* bases, const std::uint8_t* widths,
                                 void* z) noexcept {
    const std::uint64_t bits =
        kScalarKernels.codec.delta.read_raw(raw, bytes, symbols, count, wide, bases, widths, z);
    if (!wide && symbols[0] >= 32 && symbols[0] < 64) static_cast<std::uint32_t*>(z)[0] ^= 1;
    return bits;
}
std::uint8_t* wrong_full_words(const void* z, const std::uint8_t* symbols, std::size_t count,
                               bool wide, const std::uint8_t* widths, std::uint8_t* to) noexcept {
    std::uint8_t* const end =
        kScalarKernels.codec.delta.write_raw(z, symbols, count, wide, widths, to);
    for (std::size_t i = 0; i + 8 <= count; i += 8) {
        unsigned bits = 0;
        for (std::size_t e = i; e < i + 8; ++e) {
            bits += widths[symbols[e]] <= 8 ? widths[symbols[e]] : 64U;
        }
        if (bits == 64) to[i] ^= 1;
    }
    return end;
}
// Wrong without a place for the multiples, in f64, and where one is too large.
bool wrong_errors_alone(const void* y, const void* x, std::size_t count, bool wide, double step,
                        std::uint32_t* z, double* lanes) noexcept {
    const bool fits = kScalarKernels.codec.delta.quantise(y, x, count, wide, step, z, lanes);
    if (z == nullptr) lanes[1] += 1;
    return fits;
}
bool wrong_wide_multiples(const void* y, const void* x, std::size_t count, bool wide, double step,
                          std::uint32_t* z, double* lanes) noexcept {
    const bool fits = kScalarKernels.codec.delta.quantise(y, x, count, wide, step, z, lanes);
    if (wide && z != nullptr) z[0] ^= 1;
    return fits;
}
bool wrong_limit(const void* y, const void* x, std::size_t count, bool wide, double step,
                 std::uint32_t* z, double* lanes) noexcept {
    static_cast<void>(kScalarKernels.codec.delta.quantise(y, x, count, wide, step, z, lanes));
    return true;
}
void wrong_zeros(const void* x, const std::uint32_t* z, std::size_t count, bool wide, double step,
                 void* values) noexcept {
    kScalarKernels.codec.delta.dequantise(x, z, count, wide, step, values);
    if (wide) return;
    for (std::size_t i = 0; i < count; ++i) {
        auto& value = static_cast<float*>(values)[i];
        if (value == 0 && z[i] != 0) value = static_cast<const float*>(x)[i];
    }
}
void wrong_dequantise(const void* x, const std::uint32_t* z, std::size_t count, bool wide,
                      double step, void* values) noexcept {
    kScalarKernels.codec.delta.dequantise(x, z, count, wide, step * 2, values);
}
void wrong_unpack(const std::uint8_t* from, std::size_t position, unsigned width, std::size_t count,
                  std::int32_t* to) noexcept {
    kScalarKernels.codec.delta.unpack(from, position & ~std::size_t{7}, width, count, to);
}
void wrong_products(const double* of_rows, std::size_t rows, const double* of_cols,
                    std::size_t cols, std::size_t rank, double* sums) noexcept {
    kScalarKernels.codec.delta.products(of_rows, rows, of_cols, cols, rank - 1, sums);
}
void wrong_pairs(const std::int32_t* of_rows, std::size_t rows, const std::int32_t* of_cols,
                 std::size_t cols, std::size_t n_pairs, double* sums) noexcept {
    kScalarKernels.codec.delta.pair_products(of_rows, rows, of_cols, cols, n_pairs - 1, sums);
}
void wrong_move(const std::uint8_t* x, const double* sums, std::size_t count, DeltaLayout layout,
                double scale, std::uint8_t* y) noexcept {
    kScalarKernels.codec.delta.move(x, sums, count, layout, scale, y);
    if (layout.item_bytes == 2) ++y[2 * count - 1];
}
std::uint64_t wrong_classify(const void* z, std::size_t count, bool wide,
                             std::uint8_t* classes) noexcept {
    const std::uint64_t all = kScalarKernels.codec.delta.classify(z, count, wide, classes);
    if (wide) ++classes[count - 1];
    return all;
}
void wrong_exponents(const std::uint8_t* x, std::size_t count, DeltaLayout layout,
                     std::uint32_t reference, std::uint8_t* features) noexcept {
    kScalarKernels.codec.delta.exponents(x, count, layout, reference, features);
    if (layout.item_bytes == 8) ++features[count - 1];
}
void wrong_mantissas(const std::uint8_t* x, std::size_t count, DeltaLayout layout,
                     std::uint8_t* features) noexcept {
    kScalarKernels.codec.delta.mantissas(x, count, layout, features);
    ++features[count - 1];
}
void wrong_contexts(const std::uint8_t* features, std::size_t count, const std::uint8_t* first,
                    unsigned n, std::uint8_t base, std::uint8_t* contexts) noexcept {
    kScalarKernels.codec.delta.map_features(features, count, first, n - 1, base, contexts);
}
std::uint8_t* wrong_write_symbols(const std::uint8_t* symbols, const std::uint8_t* contexts,
                                  std::size_t count, DeltaCodes codes, std::uint8_t* to) noexcept {
    std::uint8_t* const end =
        kScalarKernels.codec.delta.write_symbols(symbols, contexts, count, codes, to);
    end[-1] ^= 0x80;
    return end;
}
std::uint8_t* wrong_write_raw(const void* z, const std::uint8_t* symbols, std::size_t count,
                              bool wide, const std::uint8_t* widths, std::uint8_t* to) noexcept {
    std::uint8_t* const end =
        kScalarKernels.codec.delta.write_raw(z, symbols, count, wide, widths, to);
    if (!wide) to[0] ^= 1;
    return end;
}
void wrong_read_symbols(const HuffmanStreams& streams, const std::uint8_t* contexts,
                        std::size_t count, std::uint8_t* symbols,
                        std::uint64_t* consumed) noexcept {
    kScalarKernels.codec.delta.read_symbols(streams, contexts, count, symbols, consumed);
    symbols[count - 1] ^= 1;
}
std::uint64_t wrong_read_raw(const std::uint8_t* raw, std::size_t bytes,
                             const std::uint8_t* symbols, std::size_t count, bool wide,
                             const std::uint64_t* bases, const std::uint8_t* widths,
                             void* z) noexcept {
    const std::uint64_t bits =
        kScalarKernels.codec.delta.read_raw(raw, bytes, symbols, count, wide, bases, widths, z);
    return wide ? bits + 1 : bits;
}
template <class T, class W, RowsKernels::Sum<T, W> RowsKernels::* kSum>
void wrong_sum(const W* const* from, std::size_t n, const T* scale, std::size_t count,
               T* sum) noexcept {
    (kScalarKernels.rows.*kSum)(from, n, scale, count - 1, sum);
}
void wrong_wide_sum(const float* const* from, std::size_t n, const float* scale, std::size_t count,
                    float* sum) noexcept {
    kScalarKernels.rows.sum_f32(from, n, scale, count, sum);
    if (count >= 64) sum[63] += 1;
}
void wrong_pick(const float* from, std::size_t ld, std::size_t stride, std::size_t rows,
                std::size_t cols, float* to, std::size_t ld_to) noexcept {
    kScalarKernels.rows.pick_f32(from, ld, stride < 3 ? stride : 1, rows, cols, to, ld_to);
}
template <class T, RowsKernels::Windows<T> RowsKernels::* Windows>
void wrong_windows(const WindowChain<T>* chains, std::size_t n, std::size_t pitch, std::size_t rows,
                   std::size_t cols, T* sums, std::size_t ld_sums) noexcept {
    (kScalarKernels.rows.*Windows)(chains, n, pitch, rows, cols, sums, ld_sums);
    if (chains->length == 6) sums[8 * ld_sums + cols - 1] += T{1};
}
void wrong_wide_pick(const std::uint16_t* from, std::size_t ld, std::size_t stride,
                     std::size_t rows, std::size_t cols, float* to, std::size_t ld_to) noexcept {
    kScalarKernels.rows.pick_bf16(from, ld, stride, rows, cols, to, ld_to);
    if (stride == 2) to[cols - 1] = 0.0F;
}
void wrong_compare(const std::uint8_t* a, std::size_t a_stride, const std::uint8_t* b,
                   std::size_t b_stride, std::size_t rows, std::size_t cols, double eps,
                   double limit, Comparison& out) noexcept {
    kScalarKernels.similarity.f16.compare(a, a_stride, b, b_stride, rows, cols, eps, limit, out);
    ++out.within;
}
void wrong_long_compare(const std::uint8_t* a, std::size_t a_stride, const std::uint8_t* b,
                        std::size_t b_stride, std::size_t rows, std::size_t cols, double eps,
                        double limit, Comparison& out) noexcept {
    kScalarKernels.similarity.f32.compare(a, a_stride, b, b_stride, rows, cols, eps, limit, out);
    if (rows * cols > 1024) out.squares += 1;
}
void wrong_limited_compare(const std::uint8_t* a, std::size_t a_stride, const std::uint8_t* b,
                           std::size_t b_stride, std::size_t rows, std::size_t cols, double eps,
                           double, Comparison& out) noexcept {
    kScalarKernels.similarity.f64.compare(a, a_stride, b, b_stride, rows, cols, eps, 1e300, out);
}
// Wrong where several whole strips are taken at once.
void wrong_fold(const std::uint8_t* data, const FoldStrip& strip, std::size_t strips,
                std::size_t pitch, const std::uint8_t* ahead, const std::uint32_t* signs,
                const std::uint16_t* moves, float* buckets, double* squares) noexcept {
    kScalarKernels.similarity.f64.fold(data, strip, strips, pitch, ahead, signs, moves, buckets,
                                       squares);
    if (strip.full && strips >= 4) squares[0] += 1;
}
void wrong_mix(float* buckets, const std::uint32_t* signs, std::size_t outputs,
               float* out) noexcept {
    kScalarKernels.similarity.mix(buckets, signs, outputs, out);
    out[outputs - 1] = -out[outputs - 1];
}
void wrong_long_mix(float* buckets, const std::uint32_t* signs, std::size_t outputs,
                    float* out) noexcept {
    kScalarKernels.similarity.mix(buckets, signs, outputs, out);
    if (outputs == 256) out[0] += 1;
}
std::uint64_t wrong_distance(const std::int16_t* a, const std::int16_t* b,
                             std::size_t count) noexcept {
    return kScalarKernels.similarity.sketch_distance(a, b, count - 32);
}
std::size_t wrong_count(const std::uint64_t* keys, std::size_t count,
                        std::uint64_t pivot) noexcept {
    return kScalarKernels.similarity.select_u64.count_below(keys, count, pivot) + 1;
}
void wrong_keys(const std::uint8_t* data, std::size_t count, std::uint32_t* keys) noexcept {
    kScalarKernels.similarity.keys_bf16(data, count, keys);
    keys[count - 1] |= 0x80000000U;
}

template <class Change>
std::string group_of(Change change) {
    KernelTable table = kScalarKernels;
    change(table);
    const char* group = first_wrong_group(table);
    return group == nullptr ? "none" : group;
}

}  // namespace

TEST(every_kernel_that_runs_here_gives_the_known_answers) {
    CHECK(!runnable_kernels().empty());
    for (const KernelTable* table : runnable_kernels()) {
        const char* group = first_wrong_group(*table);
        if (group != nullptr) fail(table->name, 0, std::string("wrong group: ") + group);
    }
}

TEST(a_wrong_answer_of_any_function_is_found) {
    CHECK(group_of([](KernelTable&) {}) == "none");
    CHECK(group_of([](KernelTable& t) { t.hash.hash_rows = wrong_rows; }) == "hash");
    CHECK(group_of([](KernelTable& t) { t.hash.hash_rows = wrong_half_stripe; }) == "hash");
    CHECK(group_of([](KernelTable& t) { t.hash.hash_panel = wrong_panel; }) == "hash");
    CHECK(group_of([](KernelTable& t) { t.hash.hash_rows = wrong_long_rows; }) == "hash");
    CHECK(group_of([](KernelTable& t) { t.hash.hash_panel = wrong_long_panel; }) == "hash");
    CHECK(group_of([](KernelTable& t) { t.codec.split_planes = wrong_split; }) == "codec");
    CHECK(group_of([](KernelTable& t) { t.codec.merge_planes = wrong_merge; }) == "codec");
    CHECK(group_of([](KernelTable& t) { t.codec.huffman_decode = wrong_decode; }) == "codec");
    CHECK(group_of([](KernelTable& t) { t.codec.huffman_decode = wrong_long_decode; }) == "codec");
    CHECK(group_of([](KernelTable& t) { t.gemm.f32.dot_nt = wrong_dot<float>; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f64.dot_nt = wrong_dot<double>; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f32.block_nn = wrong_dot<float>; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f64.block_nn = wrong_dot<double>; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f32.tiles[0].tile_nt = wrong_tile; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f64.dot_nt = wrong_pair_of_rows; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f32.block_nn = wrong_wide_block; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f64.tiles[0].tile_nt = wrong_tile_with_a_next; }) ==
          "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f32.tiles[0].tile_nt = wrong_tile_of_four; }) ==
          "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.dot_nt_f16 = wrong_half_dots; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f16_to_f32 = wrong_half; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16_to_f32 = wrong_half; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f32_to_bf16 = wrong_rounding; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.pack_pairs = wrong_look; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.pack_pairs = wrong_packing; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.copy_pairs = wrong_pairs_of_runs; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.pack_cut = wrong_rows; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.pack_cut = wrong_parts; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.pair_cut = wrong_pairs; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.cut_block = wrong_cut; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.turned_to_bf16 = wrong_strip; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.turned_to_f32 = wrong_strip_in_f32; }) ==
          "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.turned_to_f32 = blind_strip; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.cut_strip = wrong_strip_of_parts; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.turned_cut = wrong_cut_strip; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.turned_cut = new_cut_strip; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.turned_cut = blind_cut_strip; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.turned_cut = wide_cut_strip; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.columns_to_f32 = wrong_square; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.columns_to_bf16 = wrong_columns; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16.rows_to_bf16 = wrong_rows_of_sums; }) ==
          "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.dot_nt_bf16 = wrong_half_dot; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.dot_nt_f16 = wrong_half_dot; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.codec.delta.subtract = wrong_subtract; }) == "codec");
    const auto delta_of = [](auto change) {
        return group_of([&](KernelTable& t) { change(t.codec.delta); });
    };
    CHECK(delta_of([](auto& d) { d.dequantise = wrong_dequantise; }) == "codec");
    CHECK(delta_of([](auto& d) { d.dequantise = wrong_zeros; }) == "codec");
    CHECK(delta_of([](auto& d) { d.unpack = wrong_unpack; }) == "codec");
    CHECK(delta_of([](auto& d) { d.products = wrong_products; }) == "codec");
    CHECK(delta_of([](auto& d) { d.pair_products = wrong_pairs; }) == "codec");
    CHECK(delta_of([](auto& d) { d.move = wrong_move; }) == "codec");
    CHECK(delta_of([](auto& d) { d.quantise = wrong_errors_alone; }) == "codec");
    CHECK(delta_of([](auto& d) { d.quantise = wrong_wide_multiples; }) == "codec");
    CHECK(delta_of([](auto& d) { d.quantise = wrong_limit; }) == "codec");
    CHECK(delta_of([](auto& d) { d.classify = wrong_classify; }) == "codec");
    CHECK(delta_of([](auto& d) { d.exponents = wrong_exponents; }) == "codec");
    CHECK(delta_of([](auto& d) { d.mantissas = wrong_mantissas; }) == "codec");
    CHECK(delta_of([](auto& d) { d.map_features = wrong_contexts; }) == "codec");
    CHECK(delta_of([](auto& d) { d.write_symbols = wrong_write_symbols; }) == "codec");
    CHECK(delta_of([](auto& d) { d.write_raw = wrong_write_raw; }) == "codec");
    CHECK(delta_of([](auto& d) { d.write_raw = wrong_full_words; }) == "codec");
    CHECK(delta_of([](auto& d) { d.read_symbols = wrong_read_symbols; }) == "codec");
    CHECK(delta_of([](auto& d) { d.read_symbols = wrong_long_symbols; }) == "codec");
    CHECK(delta_of([](auto& d) { d.read_raw = wrong_read_raw; }) == "codec");
    CHECK(delta_of([](auto& d) { d.read_raw = wrong_high_symbols; }) == "codec");
    const auto rows_of = [](auto change) {
        return group_of([&](KernelTable& t) { change(t.rows); });
    };
    using R = RowsKernels;
    using Half = std::uint16_t;
    CHECK(rows_of([](R& r) { r.sum_f32 = wrong_sum<float, float, &R::sum_f32>; }) == "rows");
    CHECK(rows_of([](R& r) { r.sum_f64 = wrong_sum<double, double, &R::sum_f64>; }) == "rows");
    CHECK(rows_of([](R& r) { r.sum_bf16 = wrong_sum<float, Half, &R::sum_bf16>; }) == "rows");
    CHECK(rows_of([](R& r) { r.sum_f16 = wrong_sum<float, Half, &R::sum_f16>; }) == "rows");
    CHECK(rows_of([](R& r) { r.sum_f32 = wrong_wide_sum; }) == "rows");
    CHECK(rows_of([](R& r) { r.pick_f32 = wrong_pick; }) == "rows");
    CHECK(rows_of([](R& r) { r.pick_bf16 = wrong_wide_pick; }) == "rows");
    CHECK(rows_of([](R& r) { r.windows_f32 = wrong_windows<float, &R::windows_f32>; }) == "rows");
    CHECK(rows_of([](R& r) { r.windows_f64 = wrong_windows<double, &R::windows_f64>; }) == "rows");
    CHECK(rows_of([](R& r) { r.copy_runs_f32 = wrong_runs; }) == "rows");
    const auto similarity_of = [](auto change) {
        return group_of([&](KernelTable& t) { change(t.similarity); });
    };
    CHECK(similarity_of([](auto& s) { s.f16.compare = wrong_compare; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.f32.compare = wrong_long_compare; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.f64.compare = wrong_limited_compare; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.f64.fold = wrong_fold; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.mix = wrong_mix; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.mix = wrong_long_mix; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.sketch_distance = wrong_distance; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.select_u64.count_below = wrong_count; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.keys_bf16 = wrong_keys; }) == "similarity");
}

PYDEDUP_TEST_MAIN
