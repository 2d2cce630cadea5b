// SPDX-License-Identifier: Apache-2.0
// Blocks that are nearly equal: an index of sketches (L2 LSH), exact distances, and magnitudes.
// Elements are f32, f64, f16 or bf16. Results are the same bits from every kernel, for any number
// of threads, and for any cut of a batch. docs/kernels.md, "Similarity", explains the method.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "pydedup/types.hpp"

namespace pydedup {

namespace similarity {
struct IndexState;
}

/// Equal blocks in somebody else's memory. Block i begins at data + (i / per_line) * line_pitch +
/// (i % per_line) * block_pitch; its rows are row_stride apart. All distances are in bytes.
struct BlockBatch {
    const std::byte* data;
    std::size_t count;
    std::size_t rows, cols;
    std::size_t row_stride;
    std::size_t per_line;
    std::size_t block_pitch, line_pitch;
    Dtype dtype;

    [[nodiscard]] const std::byte* block(std::size_t i) const noexcept {
        return data + i / per_line * line_pitch + i % per_line * block_pitch;
    }
};

/// `count` dense blocks, one after another. Throws Error{invalid_argument} for a dtype that is not
/// a float, a shape without elements, or a size that overflows.
[[nodiscard]] BlockBatch dense_blocks(const std::byte* data, std::size_t count, std::size_t rows,
                                      std::size_t cols, Dtype dtype);

/// The whole blocks of a matrix, row-major, where they lie; edge blocks are left out.
[[nodiscard]] BlockBatch whole_blocks(const MatrixRef& matrix, std::size_t block_rows,
                                      std::size_t block_cols);

// ---- the index ----------------------------------------------------------------------------------

struct LshParameters {
    Dtype dtype;
    std::size_t rows, cols;  ///< of every block
    double r;                ///< width of a bucket, as a relative L2 distance: 1/128 to 16
    std::size_t bands;       ///< 1 to 64
    std::size_t band_rows;   ///< hashes per band, 1 to 64; bands * band_rows is at most 512
    std::uint64_t seed;
};

/// Version of sketches and of their serialised form.
inline constexpr std::uint16_t kSimilarityVersion = 1;

/// Of a bucket with more distinct sketches than this, those added first are looked at.
inline constexpr std::size_t kBucketCap = 256;
/// Of more blocks with one sketch than this (or than `k`), those added first are looked at.
inline constexpr std::size_t kTwinCap = 64;

/// Sketches of blocks by id. Blocks are not kept. Thread-safe: queries run side by side, changes
/// alone. A block that holds NaN or infinity is counted and never found, and finds nothing.
class L2Index {
  public:
    /// Throws Error{invalid_argument} for parameters out of range.
    explicit L2Index(const LshParameters& parameters);
    ~L2Index();
    L2Index(const L2Index&) = delete;
    L2Index& operator=(const L2Index&) = delete;

    [[nodiscard]] const LshParameters& parameters() const noexcept;
    [[nodiscard]] std::size_t size() const noexcept;
    [[nodiscard]] std::size_t memory_bytes() const noexcept;
    [[nodiscard]] bool contains(std::int64_t id) const;
    /// All ids, ascending.
    [[nodiscard]] std::vector<std::int64_t> ids() const;

    /// All or nothing. Throws Error{invalid_argument} for a batch of another shape or dtype, a
    /// negative id, and one that is in the index or twice in `ids`.
    void add(const BlockBatch& blocks, std::span<const std::int64_t> ids, unsigned threads = 0);

    /// Adds those blocks of another index that this one does not have, by id, as if they were added
    /// in its order; all or nothing. Throws Error{invalid_argument} unless the parameters are
    /// equal.
    void merge(const L2Index& other, unsigned threads = 0);

    /// A new index of these blocks, under other ids. Throws Error{invalid_argument} for an id that
    /// is not there, and as add() does for new ids.
    [[nodiscard]] std::unique_ptr<L2Index> select(std::span<const std::int64_t> ids,
                                                  std::span<const std::int64_t> new_ids) const;

    /// All or nothing. Throws Error{invalid_argument} for an id that is not there or given twice.
    void remove(std::span<const std::int64_t> ids);

    /// The `k` nearest candidates per block by estimated relative L2 distance, then by id: row i of
    /// `ids` and `distances` (blocks.count * k), filled up with -1 and infinity.
    void query(const BlockBatch& blocks, std::size_t k, std::span<std::int64_t> ids,
               std::span<double> distances, unsigned threads = 0) const;

    /// The hashes floor((a . v + b) / r) of each block, bands * band_rows each; a block that is
    /// zero or not finite has none, and gets the least number.
    void hashes(const BlockBatch& blocks, std::span<std::int32_t> out, unsigned threads = 0) const;

    /// The serialised form (docs/format.md, "Similarity index").
    [[nodiscard]] std::vector<std::byte> save() const;
    /// Throws Error{corrupt_page} for bytes that are no index, Error{unsupported_format} for those
    /// of a newer version.
    [[nodiscard]] static std::unique_ptr<L2Index> load(Bytes bytes, unsigned threads = 0);

  private:
    explicit L2Index(std::unique_ptr<similarity::IndexState> state);
    std::unique_ptr<similarity::IndexState> state_;
};

// ---- exact distances ----------------------------------------------------------------------------

struct Distance {
    double relative_l2;  ///< |a - b| / |a|: 0 for two zero blocks, infinity where only a is zero
    double greatest;     ///< greatest |a - b|
    double share;        ///< entries with |a - b| <= eps / entries
};

/// Distances of the pairs (a[left[i]], b[right[i]]), computed in one pass. A pair with a NaN or an
/// infinity is infinitely far, and its greatest difference is infinite. Once a pair is known to be
/// farther than `limit`, its relative_l2 is infinity and the other two are NaN. Sums are of lanes
/// in the type of the elements (at least f32) over 1,024 elements, then in f64.
void compare_blocks(const BlockBatch& a, const BlockBatch& b, std::span<const std::int64_t> left,
                    std::span<const std::int64_t> right, double eps, double limit,
                    std::span<Distance> out, unsigned threads = 0);

// ---- magnitudes ---------------------------------------------------------------------------------

/// Third quartile of |w| per block, between two elements linear in f64: with the n elements in
/// order, and p = 0.75 (n - 1), x[floor p] + (p - floor p) * (x[floor p + 1] - x[floor p]). NaN for
/// a block that holds a NaN; infinity is the greatest magnitude.
void block_magnitudes(const BlockBatch& blocks, std::span<double> out, unsigned threads = 0);

}  // namespace pydedup
