// SPDX-License-Identifier: Apache-2.0
// The block hash as a hash: avalanche, independence of its bits, and no collisions where inputs are
// alike. All with fixed seeds, on the kernel in use; other tests show that kernels agree.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "check.hpp"
#include "kernels.hpp"
#include "pydedup/hash.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

using Data = std::vector<std::uint8_t>;

Digest digest_of(const Data& data, std::size_t rows = 1, std::uint64_t seed = 0) {
    const std::size_t row_bytes = data.size() / rows;
    return hash_rows(reinterpret_cast<const std::byte*>(data.data()), rows, row_bytes, row_bytes,
                     seed);
}

void flip(Data& data, std::size_t bit) {
    data[bit / 8] = static_cast<std::uint8_t>(data[bit / 8] ^ (1U << (bit % 8)));
}

constexpr std::size_t kBits = 128;

bool bit_of(const Digest& digest, std::size_t bit) {
    return ((bit < 64 ? digest.lo : digest.hi) >> (bit % 64) & 1) != 0;
}

Digest difference(const Digest& a, const Digest& b) { return {a.lo ^ b.lo, a.hi ^ b.hi}; }

// Each half is to be free of collisions by itself: among n inputs two halves agree by chance with
// probability n^2 / 2^65, less than 1 in 10^8 for all that is counted here.
class Distinct {
  public:
    void add(const Digest& digest) {
        low_.push_back(digest.lo);
        high_.push_back(digest.hi);
    }
    [[nodiscard]] std::size_t size() const { return low_.size(); }
    [[nodiscard]] bool holds() { return all_distinct(low_) && all_distinct(high_); }

  private:
    static bool all_distinct(std::vector<std::uint64_t>& values) {
        std::ranges::sort(values);
        return std::ranges::adjacent_find(values) == values.end();
    }
    std::vector<std::uint64_t> low_, high_;
};

// Lanes of 8 bytes that differ from each other in a few bits only.
Data numbered_lanes(std::size_t count) {
    Data data(count * 8);
    for (std::uint64_t i = 0; i < count; ++i) std::memcpy(&data[i * 8], &i, 8);
    return data;
}

void swap_pieces(Data& data, std::size_t piece, std::size_t i, std::size_t j) {
    std::swap_ranges(data.begin() + static_cast<std::ptrdiff_t>(i * piece),
                     data.begin() + static_cast<std::ptrdiff_t>((i + 1) * piece),
                     data.begin() + static_cast<std::ptrdiff_t>(j * piece));
}

}  // namespace

// Every input bit changes every output bit with probability 1/2. Over n trials the share has the
// standard deviation 1 / (2 sqrt n); with some 10^5 pairs, 6 deviations are never reached by
// chance.
TEST(every_bit_of_the_input_reaches_every_bit_of_the_digest) {
    std::mt19937_64 random(11);
    for (const auto& [bytes, rows] : {std::pair<std::size_t, std::size_t>{4, 1},
                                      {8, 1},
                                      {40, 1},
                                      {128, 1},
                                      {200, 4},
                                      {1100, 1}}) {
        const std::size_t trials = scaled(bytes > 500 ? 100 : 300);
        const double most = 6 * 0.5 / std::sqrt(static_cast<double>(trials));
        double worst = 0;
        double total = 0;
        // Of long inputs a sample of the bits: each lane and each stripe is in it.
        const std::size_t step = bytes > 500 ? 29 : 1;
        std::size_t pairs = 0;
        for (std::size_t bit = 0; bit < bytes * 8; bit += step) {
            std::array<std::uint32_t, kBits> flips{};
            for (std::size_t t = 0; t < trials; ++t) {
                Data data = random_bytes(bytes, random);
                const Digest before = digest_of(data, rows);
                flip(data, bit);
                const Digest changed = difference(before, digest_of(data, rows));
                for (std::size_t out = 0; out < kBits; ++out) flips[out] += bit_of(changed, out);
            }
            for (const std::uint32_t count : flips) {
                const double share = count / static_cast<double>(trials);
                worst = std::max(worst, std::abs(share - 0.5));
                total += share;
                ++pairs;
            }
        }
        CHECK(worst < most);
        CHECK(std::abs(total / static_cast<double>(pairs) - 0.5) < 0.005);
    }
}

TEST(every_bit_of_the_seed_reaches_every_bit_of_the_digest) {
    std::mt19937_64 random(12);
    const std::size_t trials = scaled(300);
    double worst = 0;
    for (unsigned bit = 0; bit < 64; ++bit) {
        std::array<std::uint32_t, kBits> flips{};
        for (std::size_t t = 0; t < trials; ++t) {
            const Data data = random_bytes(160, random);
            const std::uint64_t seed = random();
            const Digest changed = difference(digest_of(data, 1, seed),
                                              digest_of(data, 1, seed ^ (std::uint64_t{1} << bit)));
            for (std::size_t out = 0; out < kBits; ++out) flips[out] += bit_of(changed, out);
        }
        for (const std::uint32_t count : flips) {
            worst = std::max(worst, std::abs(count / static_cast<double>(trials) - 0.5));
        }
    }
    CHECK(worst < 6 * 0.5 / std::sqrt(static_cast<double>(trials)));
}

// Bit independence (Webster and Tavares 1985): when an input bit changes, the changes of any two
// bits of the digest are uncorrelated. Correlations of n samples deviate by 1 / sqrt n.
TEST(bits_of_the_digest_change_independently) {
    std::mt19937_64 random(13);
    const std::size_t words = scaled(64);  // of 64 samples
    const double most = 6 / std::sqrt(64.0 * static_cast<double>(words));
    for (const std::size_t bytes : {8, 128, 1024, 1500}) {
        // One input bit in the first lane, one in the last, and any.
        for (int kind = 0; kind < 3; ++kind) {
            std::vector<std::array<std::uint64_t, kBits>> changes(words);
            for (auto& word : changes) {
                word.fill(0);
                for (unsigned sample = 0; sample < 64; ++sample) {
                    Data data = random_bytes(bytes, random);
                    const Digest before = digest_of(data);
                    const std::size_t bits = bytes * 8;
                    flip(data, kind == 0 ? 5 : kind == 1 ? bits - 3 : random() % bits);
                    const Digest changed = difference(before, digest_of(data));
                    for (std::size_t out = 0; out < kBits; ++out) {
                        word[out] |= static_cast<std::uint64_t>(bit_of(changed, out)) << sample;
                    }
                }
            }
            double worst = 0;
            for (std::size_t a = 0; a < kBits; ++a) {
                for (std::size_t b = a + 1; b < kBits; ++b) {
                    std::size_t differ = 0;
                    for (const auto& word : changes) {
                        differ += static_cast<std::size_t>(std::popcount(word[a] ^ word[b]));
                    }
                    const double share =
                        static_cast<double>(differ) / (64.0 * static_cast<double>(words));
                    worst = std::max(worst, std::abs(1 - 2 * share));
                }
            }
            CHECK(worst < most);
        }
    }
}

TEST(zeros_of_every_length_and_shape_differ) {
    Distinct seen;
    for (std::size_t length = 0; length <= scaled(5000); ++length)
        seen.add(digest_of(Data(length)));
    // Shapes of the same bytes; one row of each length is in already.
    for (std::size_t rows = 2; rows <= 64; ++rows) {
        for (std::size_t row_bytes = 0; row_bytes <= 140; ++row_bytes) {
            const Data zeros(rows * row_bytes + 1);
            seen.add(hash_rows(reinterpret_cast<const std::byte*>(zeros.data()), rows, row_bytes,
                               row_bytes));
        }
    }
    CHECK(seen.size() > 9000);
    CHECK(seen.holds());
}

TEST(single_and_double_bit_flips_do_not_collide) {
    std::mt19937_64 random(14);
    for (const bool noise : {false, true}) {
        Distinct seen;
        Data block = noise ? random_bytes(4096, random) : Data(4096);
        seen.add(digest_of(block, 64));
        for (std::size_t bit = 0; bit < block.size() * 8; ++bit) {
            flip(block, bit);
            seen.add(digest_of(block, 64));
            flip(block, bit);
        }
        CHECK(seen.holds());

        Distinct pairs;
        Data small = noise ? random_bytes(40, random) : Data(40);
        for (std::size_t a = 0; a < small.size() * 8; ++a) {
            flip(small, a);
            pairs.add(digest_of(small));
            for (std::size_t b = a + 1; b < small.size() * 8; ++b) {
                flip(small, b);
                pairs.add(digest_of(small));
                flip(small, b);
            }
            flip(small, a);
        }
        CHECK(pairs.size() == 320 + 320 * 319 / 2);
        CHECK(pairs.holds());
    }
}

TEST(permuted_lanes_and_rows_do_not_collide) {
    // Swaps of any two lanes of 8 bytes: also those that meet the same key in other groups.
    const std::size_t lanes = scaled(400);
    Data block = numbered_lanes(lanes);
    Distinct swaps;
    swaps.add(digest_of(block));
    for (std::size_t i = 0; i < lanes; ++i) {
        for (std::size_t j = i + 1; j < lanes; ++j) {
            swap_pieces(block, 8, i, j);
            swaps.add(digest_of(block));
            swap_pieces(block, 8, i, j);
        }
    }
    CHECK(swaps.holds());

    // The halves of lanes, which are multiplied with each other.
    Distinct halves;
    for (std::size_t i = 0; i < 2 * lanes; ++i) {
        for (std::size_t j = i + 1; j < std::min(2 * lanes, i + 70); ++j) {
            Data changed = block;
            swap_pieces(changed, 4, i, j);
            if (changed != block) halves.add(digest_of(changed));  // upper halves are all zero
        }
    }
    CHECK(halves.size() > lanes && halves.holds());

    // Rows of a matrix: swaps, rotations, reversal; rows with and without a padded stripe.
    std::mt19937_64 random(15);
    for (const std::size_t row_bytes : {8, 128, 200, 256}) {
        Data matrix(64 * row_bytes);
        for (std::size_t r = 0; r < 64; ++r) {
            std::fill_n(matrix.begin() + static_cast<std::ptrdiff_t>(r * row_bytes), row_bytes,
                        static_cast<std::uint8_t>(r));
        }
        Distinct rows;
        rows.add(digest_of(matrix, 64));
        for (std::size_t i = 0; i < 64; ++i) {
            for (std::size_t j = i + 1; j < 64; ++j) {
                swap_pieces(matrix, row_bytes, i, j);
                rows.add(digest_of(matrix, 64));
                swap_pieces(matrix, row_bytes, i, j);
            }
        }
        for (std::size_t by = 1; by < 64; ++by) {
            Data turned = matrix;
            std::rotate(turned.begin(),
                        turned.begin() + static_cast<std::ptrdiff_t>(by * row_bytes), turned.end());
            rows.add(digest_of(turned, 64));
        }
        std::vector<std::size_t> order(64);
        std::iota(order.rbegin(), order.rend(), std::size_t{0});  // reversed, then any
        for (int round = 0; round < 200; ++round) {
            Data shuffled;
            for (const std::size_t r : order) {
                shuffled.insert(shuffled.end(), row_bytes, static_cast<std::uint8_t>(r));
            }
            rows.add(digest_of(shuffled, 64));
            std::ranges::shuffle(order, random);
        }
        CHECK(rows.holds());
    }
}

TEST(blocks_of_one_value_and_seeds_do_not_collide) {
    Distinct constants;
    for (std::uint32_t value = 0; value < scaled(65536); ++value) {
        Data block(512);
        for (std::size_t at = 0; at < block.size(); at += 2) {
            block[at] = static_cast<std::uint8_t>(value);
            block[at + 1] = static_cast<std::uint8_t>(value >> 8);
        }
        constants.add(digest_of(block, 8));
    }
    CHECK(constants.holds());

    std::mt19937_64 random(16);
    Distinct seeds;
    const Data zeros(256);
    for (std::uint64_t seed = 0; seed < scaled(20000); ++seed) {
        seeds.add(digest_of(zeros, 1, seed));
        seeds.add(digest_of(zeros, 1, 0 - seed - 1));
        seeds.add(digest_of(zeros, 1, random()));
    }
    CHECK(seeds.holds());
}

PYDEDUP_TEST_MAIN
