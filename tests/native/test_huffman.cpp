// SPDX-License-Identifier: Apache-2.0
// Byte planes and Huffman coding, below the frame of a block: every kernel against the scalar one,
// optimal codes.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.hpp"
#include "codec/code_lengths.hpp"
#include "codec/huffman.hpp"
#include "kernels.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

using Buffer = std::vector<std::uint8_t>;

// Checks that every kernel decodes what is encoded; returns its length.
std::size_t check_round_trip(const Buffer& plane) {
    detail::PlaneHistogram histogram;
    detail::count_bytes(plane, histogram);
    detail::HuffmanPlan plan;
    detail::plan_huffman(histogram, plan);
    // Exactly as much room as planned: a byte more is seen by ASan.
    Buffer payload(plan.payload_bytes);
    detail::huffman_encode(plane, plan, payload);
    for (const KernelTable* table : runnable_kernels()) {
        Buffer back(plane.size());
        CHECK(detail::huffman_decode(payload, payload.data() + payload.size(), table->codec,
                                     back) == nullptr);
        CHECK(back == plane);
    }
    return payload.size();
}

TEST(planes_of_every_kernel_are_those_of_the_reference) {
    std::mt19937_64 random(1);
    const auto tables = runnable_kernels();
    CHECK(!tables.empty() && tables.front() == &kernels_named("scalar"));
    for (const std::size_t item : {1, 2, 4, 8}) {
        for (const auto& [rows, cols] : {std::pair<std::size_t, std::size_t>{1, 1},
                                         {1, 15},
                                         {3, 16},
                                         {2, 17},
                                         {5, 31},
                                         {3, 33},
                                         {7, 50},
                                         {4, 64},
                                         {2, 113}}) {
            for (const std::size_t gap : {0, 5}) {
                const std::size_t stride = cols * item + gap;
                const Buffer source = random_bytes(rows * stride, random);
                for (const bool rotate : {false, true}) {
                    Buffer want(rows * cols * item);
                    tables.front()->codec.split_planes(source.data(), stride, rows, cols, item,
                                                       rotate, want.data());
                    for (const KernelTable* table : tables) {
                        Buffer planes(want.size());
                        table->codec.split_planes(source.data(), stride, rows, cols, item, rotate,
                                                  planes.data());
                        CHECK(planes == want);
                        // Gaps between rows must stay as they are.
                        Buffer merged = source;
                        std::array<const std::uint8_t*, 8> parts{};
                        for (std::size_t p = 0; p < item; ++p) {
                            parts[p] = planes.data() + p * rows * cols;
                        }
                        for (std::size_t r = 0; r < rows; ++r) {
                            std::memset(&merged[r * stride], 0xAA, cols * item);
                        }
                        table->codec.merge_planes(parts.data(), rows, cols, item, rotate,
                                                  merged.data(), stride);
                        CHECK(merged == source);
                    }
                }
            }
        }
    }
}

TEST(rotation_puts_the_exponent_of_f32_into_the_last_plane) {
    const std::array<float, 4> values = {1.0F, -1.0F, 1.9999F, -1.5F};
    std::array<std::uint8_t, 16> planes{};
    kernels().codec.split_planes(reinterpret_cast<const std::uint8_t*>(values.data()), 16, 1, 4, 4,
                                 true, planes.data());
    for (std::size_t i = 12; i < 16; ++i) CHECK(planes[i] == 127);
}

TEST(code_lengths_are_optimal_and_limited) {
    std::mt19937_64 random(2);
    for (int round = 0; round < 200; ++round) {
        std::array<std::uint32_t, 256> counts{};
        const std::size_t used = 2 + random() % 255;
        for (std::size_t i = 0; i < used; ++i) {
            // From flat to steeper than Fibonacci, which forces long codes.
            const double steep = static_cast<double>(round % 10) * 0.1;
            counts[random() % 256] +=
                1 + static_cast<std::uint32_t>(std::pow(2.0, steep * static_cast<double>(i % 28)));
        }
        if (std::count(counts.begin(), counts.end(), 0U) > 254) continue;
        const auto cost_under = [&](unsigned limit) {
            std::array<std::uint8_t, 256> bits{};
            detail::optimal_code_lengths(counts, limit, bits);
            std::uint64_t cost = 0;
            std::uint64_t kraft = 0;
            for (std::size_t s = 0; s < 256; ++s) {
                CHECK((bits[s] == 0) == (counts[s] == 0));
                CHECK(bits[s] <= limit);
                cost += std::uint64_t{counts[s]} * bits[s];
                if (bits[s] != 0) kraft += std::uint64_t{1} << (15 - bits[s]);
            }
            CHECK(kraft == std::uint64_t{1} << 15);
            return cost;
        };
        // A tighter limit costs, or the looser one was not optimal.
        const std::uint64_t loose = cost_under(15);
        const std::uint64_t tight = cost_under(kMaxCodeBits);
        const std::uint64_t tightest = cost_under(8);
        CHECK(loose <= tight && tight <= tightest);
        const std::uint64_t total = [&] {
            std::uint64_t sum = 0;
            for (const std::uint32_t n : counts) sum += n;
            return sum;
        }();
        double entropy = 0;
        for (const std::uint32_t n : counts) {
            if (n != 0)
                entropy -= n * std::log2(static_cast<double>(n) / static_cast<double>(total));
        }
        CHECK(static_cast<double>(loose) >= entropy - 1e-6);
        CHECK(static_cast<double>(tightest) <= 8.0 * static_cast<double>(total) + 1e-6);
    }
}

TEST(huffman_planes_come_back_from_every_kernel) {
    std::mt19937_64 random(3);
    for (const std::size_t n :
         {2, 3, 4, 5, 8, 9, 63, 64, 100, 1023, 1024, 1025, 4096, 5000, 70001}) {
        for (const double decay : {0.9, 0.5, 0.25, 0.1, 0.02}) {
            Buffer plane = skewed_bytes(n, decay, random);
            plane[0] = 1;  // two different bytes at least
            plane[n - 1] = 2;
            const std::size_t payload_bytes = check_round_trip(plane);
            detail::PlaneHistogram histogram;
            detail::count_bytes(plane, histogram);
            if (detail::is_incompressible(histogram, n)) CHECK(payload_bytes >= n);
        }
    }
}

// A plane whose longest codes have so many bits, and many of these one after another: how many are
// read between two looks at memory hangs on that.
Buffer plane_with_codes_of(unsigned bits) {
    // Half of what is left is one byte each, until 2^8 bytes or fewer share the rest.
    Buffer plane;
    std::size_t rest = 16384;
    unsigned taken = 0;
    for (; bits - taken > 7; ++taken) {
        rest /= 2;
        plane.insert(plane.end(), rest, static_cast<std::uint8_t>(255 - taken));
    }
    const std::size_t alike = std::size_t{1} << (bits - taken);
    for (std::size_t i = 0; i < rest; ++i) plane.push_back(static_cast<std::uint8_t>(i % alike));
    return plane;
}

// The symbols of a delta are read by the same loops, each by the code of its context.
void check_symbols(const Buffer& plane, const std::array<std::uint8_t, 256>& code_bits,
                   unsigned table_bits) {
    std::vector<std::uint32_t> codes(2 * 256);
    std::vector<std::uint16_t> table(std::size_t{2} << table_bits);
    std::size_t at = 0;
    for (unsigned bits = 1; bits <= table_bits; ++bits) {
        for (std::uint32_t s = 0; s < 256; ++s) {
            if (code_bits[s] != bits) continue;
            const unsigned unused = table_bits - bits;
            // Of the second context, the codes have all bits the other way round.
            const auto code = static_cast<std::uint32_t>(at >> unused);
            codes[s] = code << 8 | bits;
            codes[256 + s] = (code ^ ((1U << bits) - 1)) << 8 | bits;
            for (std::size_t i = 0; i < std::size_t{1} << unused; ++i, ++at) {
                const auto entry = static_cast<std::uint16_t>(s << 8 | bits);
                table[at] = table[table.size() - 1 - at] = entry;
            }
        }
    }
    Buffer contexts(plane.size());
    for (std::size_t i = 0; i < plane.size(); ++i) contexts[i] = i % 3 == 0 ? 1 : 0;
    const std::size_t segment = (plane.size() + 3) / 4;
    Buffer written(2 * plane.size() + 64);
    for (const KernelTable* table_of : runnable_kernels()) {
        const DeltaKernels& kernel = table_of->codec.delta;
        HuffmanStreams streams{};
        std::uint8_t* to = written.data();
        for (std::size_t j = 0; j < 4; ++j) {
            const std::size_t first = std::min(plane.size(), j * segment);
            const std::size_t count = std::min(segment, plane.size() - first);
            streams.begin[j] = to;
            to = kernel.write_symbols(&plane[first], &contexts[first], count, codes.data(), to);
        }
        const Buffer tight(written.data(), to);
        for (const std::uint8_t*& begin : streams.begin) {
            begin = tight.data() + (begin - written.data());
        }
        streams.end = tight.data() + tight.size();
        streams.table = table.data();
        streams.table_bits = table_bits;
        Buffer back(plane.size());
        std::array<std::uint64_t, 4> consumed{};
        kernel.read_symbols(streams, contexts.data(), plane.size(), back.data(), consumed.data());
        CHECK(back == plane);
    }
}

TEST(codes_of_every_length_come_back_also_in_a_row) {
    std::mt19937_64 random(6);
    for (unsigned bits = 1; bits <= kMaxCodeBits; ++bits) {
        Buffer plane = plane_with_codes_of(bits);
        detail::PlaneHistogram histogram;
        detail::count_bytes(plane, histogram);
        detail::HuffmanPlan plan;
        detail::plan_huffman(histogram, plan);
        CHECK(*std::max_element(plan.code_bits.begin(), plan.code_bits.end()) == bits);
        for (int order = 0; order < 3; ++order) {
            check_round_trip(plane);
            check_symbols(plane, plan.code_bits, bits);
            if (order == 0) std::reverse(plane.begin(), plane.end());
            if (order == 1) std::shuffle(plane.begin(), plane.end(), random);
        }
    }
}

TEST(streams_of_very_different_speed_come_back) {
    // One quarter takes 1 bit a symbol, another 11: the pair decoder's streams drift apart.
    std::mt19937_64 random(4);
    for (int slow = 0; slow < 4; ++slow) {
        Buffer plane(20000, 7);
        for (std::size_t i = 0; i < 5000; ++i) {
            plane[static_cast<std::size_t>(slow) * 5000 + i] =
                static_cast<std::uint8_t>(random() % 200);
        }
        check_round_trip(plane);
    }
}

TEST(random_planes_are_proven_incompressible_without_a_code) {
    std::mt19937_64 random(5);
    const Buffer plane = random_bytes(4096, random);
    detail::PlaneHistogram histogram;
    detail::count_bytes(plane, histogram);
    CHECK(detail::is_incompressible(histogram, plane.size()));
}

}  // namespace

PYDEDUP_TEST_MAIN
