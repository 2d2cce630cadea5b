// SPDX-License-Identifier: Apache-2.0
// Deltas of many blocks at once, and the raw bits of many elements.
#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "check.hpp"
#include "codec/delta_model.hpp"
#include "deltas.hpp"
#include "kernels.hpp"
#include "pydedup/codec.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

struct Batch {
    Buffer arena;
    std::vector<std::int64_t> offsets;
    std::vector<EncodedBlock> encoded;

    Encoded operator[](std::size_t i) const {
        const auto begin = arena.begin() + offsets[i];
        return {{begin, begin + encoded[i].length}, encoded[i].encoding};
    }
};

// Blocks of one grid as deltas on those of another matrix at the same place.
Batch encode_batch(const MatrixRef& to, const MatrixRef& from, const BlockGrid& grid,
                   const std::vector<std::int64_t>& indices, unsigned threads) {
    const std::size_t raw = grid.block_rows * grid.block_cols * item_bytes(to.dtype);
    const std::vector<std::int64_t> limits(indices.size(), static_cast<std::int64_t>(raw));
    Batch batch{Buffer(indices.size() * raw), std::vector<std::int64_t>(indices.size()),
                std::vector<EncodedBlock>(indices.size())};
    batch.arena.resize(encode_deltas(to, grid, indices, {from, grid, indices}, limits, std::nullopt,
                                     {at(batch.arena), batch.arena.size()}, batch.offsets,
                                     batch.encoded, threads));
    return batch;
}

std::vector<std::int64_t> all_of(const BlockGrid& grid) {
    std::vector<std::int64_t> indices(grid.count());
    std::iota(indices.begin(), indices.end(), 0);
    return indices;
}

TEST(blocks_of_a_batch_are_planned_like_those_before_where_that_is_as_good) {
    std::mt19937_64 random(19);
    constexpr std::size_t kRows = 576;
    constexpr std::size_t kCols = 256;
    const BlockGrid grid{kRows, kCols, 64, 64};
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
        // In the last rows of blocks, from the middle of a batch on, only every fourth row moved.
        const std::vector<double> values = normal(kRows * kCols, 0.02, random);
        std::vector<double> moved = normal(kRows * kCols, 2e-4, random);
        for (std::size_t i = 0; i < moved.size(); ++i) {
            const std::size_t row = i / kCols;
            moved[i] = values[i] + (row < 448 || row % 4 == 0 ? moved[i] : 0);
        }
        const Buffer base = as_dtype(values, dtype);
        const Buffer block = as_dtype(moved, dtype);
        const MatrixRef to = matrix(block, kRows, kCols, dtype);
        const MatrixRef from = matrix(base, kRows, kCols, dtype);
        Buffer first;
        for (const unsigned threads : {1U, 4U}) {
            const Batch batch = encode_batch(to, from, grid, all_of(grid), threads);
            if (first.empty()) first = batch.arena;
            CHECK(batch.arena == first);
            std::size_t n_others = 0;
            for (std::size_t i = 0; i < grid.count(); ++i) {
                const MatrixRef one = block_of(to, grid, i);
                const MatrixRef its_base = block_of(from, grid, i);
                const Encoded alone = encode(one, its_base);
                const Encoded batched = batch[i];
                CHECK(batched.bytes.size() <= alone.bytes.size() * 102 / 100);
                n_others += batched.bytes != alone.bytes ? 1U : 0U;
                CHECK(decode(batched, view(copied(its_base), 64, 64, dtype), dtype) == copied(one));
            }
            // In f32 there is nothing to choose here but the codes, and each has its own.
            CHECK((n_others > 0) == (dtype == Dtype::bf16));
        }
    }
}

TEST(a_batch_takes_no_more_room_than_its_blocks_do_alone) {
    std::mt19937_64 random(21);
    struct Family {
        Dtype dtype;
        std::size_t cols;
        double decay;
        double noise;
    };
    const Family families[] = {
        // Most weights stay: where all those of some exponents do, they cost nothing, but a bit
        // each where a single one moved; so what is best for a block says little about the next.
        {Dtype::bf16, 256, 5e-4, 1e-5},
        // Full blocks and narrow ones at the edge in turns.
        {Dtype::f16, 130, 0, 1e-4},
    };
    for (const Family& family : families) {
        const std::size_t rows = 1024;
        const BlockGrid grid{rows, family.cols, 128, 128};
        const Buffer base = as_dtype(normal(rows * family.cols, 0.02, random), family.dtype);
        std::vector<double> moved = normal(rows * family.cols, 1, random);
        const std::vector<double> values = as_doubles(base, family.dtype);
        for (std::size_t i = 0; i < moved.size(); ++i) {
            moved[i] = values[i] * (1 - family.decay) + family.noise * moved[i];
        }
        const Buffer block = as_dtype(moved, family.dtype);
        const MatrixRef to = matrix(block, rows, family.cols, family.dtype);
        const MatrixRef from = matrix(base, rows, family.cols, family.dtype);
        const Batch batch = encode_batch(to, from, grid, all_of(grid), 1);
        std::size_t alone = 0;
        for (std::size_t i = 0; i < grid.count(); ++i) {
            alone += encode(block_of(to, grid, i), block_of(from, grid, i)).bytes.size();
        }
        CHECK(batch.arena.size() <= alone * 101 / 100);
    }
}

TEST(raw_bits_are_those_of_the_reference) {
    std::mt19937_64 random(20);
    const DeltaKernels& reference = kernels_named("scalar").codec.delta;
    for (std::size_t round = 0; round < 300; ++round) {
        // A dictionary, then classes; the last rounds have some of more than 8 raw bits, or more
        // symbols than a table of bytes.
        detail::Alphabet alphabet;
        alphabet.n_dictionary = static_cast<unsigned>(random() % (round % 10 == 9 ? 100 : 40));
        for (unsigned s = 0; s < alphabet.n_dictionary; ++s) {
            alphabet.bases[s] = (round % 7 == 6 ? 300ULL : 3ULL) * (s + 1) + random() % 3;
        }
        alphabet.set_classes(static_cast<unsigned>(random() % 8),
                             1 + static_cast<unsigned>(random() % (round % 3 == 2 ? 50 : 14)));
        const std::size_t count = round % 4 == 0   ? random() % 300
                                  : round % 4 == 1 ? 32 * (8 + random() % 100)
                                                   : 256 + random() % 5000;
        std::vector<std::uint8_t> symbols(count);
        std::vector<std::uint32_t> z(count);
        const std::vector<std::uint8_t> skewed = skewed_bytes(count, 0.15, random);
        for (std::size_t i = 0; i < count; ++i) {
            symbols[i] = static_cast<std::uint8_t>((skewed[i] - 90U) % alphabet.n_symbols());
            const std::uint64_t raw = random() & ((1ULL << alphabet.widths[symbols[i]]) - 1);
            z[i] = static_cast<std::uint32_t>(alphabet.bases[symbols[i]] + raw);
        }
        Buffer wanted(4 * count + 8);
        wanted.resize(
            static_cast<std::size_t>(reference.write_raw(z.data(), symbols.data(), count, false,
                                                         alphabet.widths.data(), wanted.data()) -
                                     wanted.data()));
        for (const KernelTable* table : runnable_kernels()) {
            const DeltaKernels& delta = table->codec.delta;
            Buffer written(4 * count + 8);
            written.resize(
                static_cast<std::size_t>(delta.write_raw(z.data(), symbols.data(), count, false,
                                                         alphabet.widths.data(), written.data()) -
                                         written.data()));
            CHECK(written == wanted);
            // As long as they are, longer, and cut off at any byte.
            for (std::size_t cut = 0; cut < 5; ++cut) {
                const std::size_t bytes =
                    cut == 0   ? wanted.size()
                    : cut == 1 ? wanted.size() + random() % 200
                    : cut == 2 ? wanted.size() - std::min<std::size_t>(1, wanted.size())
                               : random() % (wanted.size() + 1);
                Buffer raw(wanted.begin(), wanted.begin() + static_cast<std::ptrdiff_t>(
                                                                std::min(bytes, wanted.size())));
                raw.resize(bytes);
                std::vector<std::uint32_t> read(count);
                const std::uint64_t end =
                    delta.read_raw(raw.data(), raw.size(), symbols.data(), count, false,
                                   alphabet.bases.data(), alphabet.widths.data(), read.data());
                std::vector<std::uint32_t> expected(count);
                CHECK(end == reference.read_raw(raw.data(), raw.size(), symbols.data(), count,
                                                false, alphabet.bases.data(),
                                                alphabet.widths.data(), expected.data()));
                CHECK((end == UINT64_MAX) == (bytes < wanted.size()));
                if (end != UINT64_MAX) CHECK(read == z);
            }
        }
    }
}

TEST(many_deltas_come_back_whatever_the_threads) {
    std::mt19937_64 random(9);
    const std::size_t rows = 150;
    const std::size_t cols = 130;
    const std::vector<double> values = normal(rows * cols, 0.02, random);
    std::vector<double> moved = values;
    for (double& value : moved) value *= 1.0 + 1e-3 * static_cast<double>(random() % 9);
    const Buffer base = as_dtype(values, Dtype::f32);
    const Buffer block = as_dtype(moved, Dtype::f32);
    const MatrixRef to = matrix(block, rows, cols, Dtype::f32);
    const MatrixRef from = matrix(base, rows, cols, Dtype::f32);
    const BlockGrid grid{rows, cols, 32, 48};
    std::vector<std::int64_t> indices;
    for (std::size_t i = grid.count(); i-- > 0;) indices.push_back(static_cast<std::int64_t>(i));
    Buffer first;
    for (const unsigned threads : {1U, 4U}) {
        const Batch batch = encode_batch(to, from, grid, indices, threads);
        if (first.empty()) first = batch.arena;
        CHECK(batch.arena == first);
        for (std::size_t i = 0; i < indices.size(); ++i) {
            const auto index = static_cast<std::size_t>(indices[i]);
            const MatrixRef one = block_of(to, grid, index);
            const Buffer its_base = copied(block_of(from, grid, index));
            CHECK(decode(batch[i], view(its_base, one.rows, one.cols, Dtype::f32), Dtype::f32) ==
                  copied(one));
        }
    }
    std::vector<std::int64_t> estimates(indices.size());
    estimate_deltas(to, grid, indices, {from, grid, indices}, std::nullopt, estimates, 2);
    for (const std::int64_t estimate : estimates) CHECK(estimate > 0);
    // Bases of another shape, too few bases, a limit that leaves the arena.
    Buffer arena(100);
    std::vector<std::int64_t> offsets(1);
    std::vector<EncodedBlock> encoded(1);
    const auto refused = [&](std::int64_t base_index, std::int64_t limit) {
        const std::array index{std::int64_t{0}};
        const std::array base_indices{base_index};
        const std::array most{limit};
        CHECK_THROWS(ErrorCode::invalid_argument,
                     static_cast<void>(encode_deltas(to, grid, index, {from, grid, base_indices},
                                                     most, std::nullopt, {at(arena), arena.size()},
                                                     offsets, encoded)));
    };
    refused(static_cast<std::int64_t>(grid.count()) - 1, 50);
    refused(-1, 50);
    refused(0, 101);
    refused(0, -1);
}

}  // namespace

PYDEDUP_TEST_MAIN
