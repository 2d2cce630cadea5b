// SPDX-License-Identifier: Apache-2.0
// Queries. A tile of blocks is sketched first and what each will read is asked for, so that waiting
// for memory overlaps.
#include <cmath>
#include <limits>
#include <mutex>

#include "similarity/batch.hpp"
#include "similarity/index.hpp"

namespace pydedup::similarity {
namespace {

constexpr std::size_t kTile = 16;
constexpr std::size_t kMostHashes = 512;

struct Candidate {
    double distance;
    std::uint32_t group;
};

struct Answer {
    double distance;
    std::int64_t id;
    bool operator<(const Answer& other) const noexcept {
        return distance != other.distance ? distance < other.distance : id < other.id;
    }
};

// Memory of one thread, made once per piece of work.
struct Scratch {
    std::vector<std::int16_t> sketches;
    std::vector<Probe> probes;
    std::vector<std::uint64_t> keys;  // per block of the tile and band
    std::vector<std::uint32_t> groups;
    std::vector<Candidate> candidates;
    std::vector<Answer> answers;
};

// |a - b| / |a| from the relative distance of the blocks scaled to unit length and the ratio of
// their lengths: |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, and a.b = |a| |b| (1 - d^2 / 2).
double unscaled(double squared, double ratio) noexcept {
    const double distance = std::sqrt((1 - ratio) * (1 - ratio) + ratio * squared);
    return distance < std::numeric_limits<double>::infinity()
               ? distance
               : std::numeric_limits<double>::infinity();  // of a NaN, too
}

// Groups that share a band with the sketch, those of full buckets up to the cap, ascending.
void collect(const IndexState& index, const std::int16_t* sketch, const std::uint64_t* keys,
             std::uint32_t twin, std::vector<std::uint32_t>& groups) {
    std::int32_t lows[kMostHashes];
    index.hashing.lows(sketch, lows);
    groups.clear();
    if (twin != kNone) groups.push_back(twin);
    for (std::size_t band = 0; band < index.parameters.bands; ++band) {
        const Chains& chains = index.bands[band];
        std::size_t found = 0;
        std::uint32_t group = chains.first(keys[band]);
        while (group != kNone && found < kBucketCap) {
            const std::uint32_t next = chains.next(group);
            if (next != kNone) {
                chains.prefetch_link(next);
                __builtin_prefetch(index.sketch_of(next) + band * index.parameters.band_rows);
            }
            if (index.hashing.same_band(index.sketch_of(group), lows, band)) {
                groups.push_back(group);
                ++found;
            }
            group = next;
        }
    }
    std::sort(groups.begin(), groups.end());
    groups.erase(std::unique(groups.begin(), groups.end()), groups.end());
}

void answer(const IndexState& index, const std::int16_t* sketch, const Probe& probe,
            const std::uint64_t* keys, std::size_t k, Scratch& scratch) {
    scratch.answers.clear();
    if (probe.kind == Kind::not_finite || k == 0) return;
    const std::uint32_t twin = index.twin_of(sketch, probe);
    scratch.candidates.clear();
    if (probe.kind == Kind::zero) {
        if (twin != kNone) scratch.candidates.push_back({0, twin});
    } else {
        collect(index, sketch, keys, twin, scratch.groups);
        const auto measure = kernels().similarity.sketch_distance;
        const std::size_t length = index.sketcher.projections();
        const double unit = 1.0 / (double{kSketchUnit} * kSketchUnit * static_cast<double>(length));
        for (const std::uint32_t group : scratch.groups) {
            const std::uint64_t sum = measure(sketch, index.sketch_of(group), length);
            const double squared = static_cast<double>(sum) * unit;
            const double ratio = index.rms[group] / probe.rms;
            scratch.candidates.push_back({unscaled(squared, ratio), group});
        }
    }
    // Each group has a member, so the k nearest groups, with all that tie, hold the k answers.
    auto& candidates = scratch.candidates;
    if (candidates.size() > k) {
        const auto nearer = [](const Candidate& a, const Candidate& b) {
            return a.distance < b.distance;
        };
        const auto kth = candidates.begin() + static_cast<std::ptrdiff_t>(k - 1);
        std::nth_element(candidates.begin(), kth, candidates.end(), nearer);
        const double farthest = kth->distance;
        std::erase_if(candidates, [=](const Candidate& c) { return c.distance > farthest; });
    }
    for (const Candidate& candidate : candidates) {
        std::size_t left = std::max(k, kTwinCap);
        for (std::uint32_t m = index.first_member[candidate.group]; m != kNone && left != 0;
             m = index.members[m].next, --left) {
            scratch.answers.push_back({candidate.distance, index.member_ids[m]});
        }
    }
    const std::size_t wanted = std::min(k, scratch.answers.size());
    std::partial_sort(scratch.answers.begin(),
                      scratch.answers.begin() + static_cast<std::ptrdiff_t>(wanted),
                      scratch.answers.end());
    scratch.answers.resize(wanted);
}

void prepare(const IndexState& index, const BlockBatch& blocks, const Sketcher::Plan& plan,
             std::size_t begin, std::size_t count, Scratch& scratch) {
    const std::size_t length = index.sketcher.projections();
    const std::size_t n_bands = index.parameters.bands;
    for (std::size_t i = 0; i < count; ++i) {
        std::int16_t* sketch = scratch.sketches.data() + i * length;
        Probe& probe = scratch.probes[i];
        probe.kind = index.sketcher.sketch(blocks, plan, begin + i, sketch, probe.rms);
        probe.twin_key = index.twin_key(sketch, probe.rms);
        index.bands.back().prefetch_head(probe.twin_key);
        for (std::size_t band = 0; band < n_bands; ++band) {
            std::uint64_t& key = scratch.keys[i * n_bands + band];
            key = index.hashing.key(sketch, band);
            index.bands[band].prefetch_head(key);
        }
    }
    for (std::size_t i = 0; i < count; ++i) {
        for (std::size_t band = 0; band <= n_bands; ++band) {
            const Chains& chains = index.bands[band];
            const std::uint64_t key =
                band == n_bands ? scratch.probes[i].twin_key : scratch.keys[i * n_bands + band];
            const std::uint32_t group = chains.first(key);
            if (group == kNone) continue;
            chains.prefetch_link(group);
            __builtin_prefetch(index.sketch_of(group) +
                               (band == n_bands ? 0 : band * index.parameters.band_rows));
        }
    }
}

}  // namespace

void IndexState::query(const BlockBatch& blocks, std::size_t k, std::span<std::int64_t> out_ids,
                       std::span<double> distances, unsigned threads) const {
    check_batch(blocks);
    check_places(out_ids.size(), blocks.count, k, "places", "answers");
    check_places(distances.size(), blocks.count, k, "distances", "answers");
    const auto plan = sketcher.plan(blocks.row_stride, item_bytes(blocks.dtype));
    for_blocks(blocks.count, block_bytes(blocks) + 4096, threads,
               [&](std::size_t begin, std::size_t end) {
                   Scratch scratch;
                   scratch.sketches.resize(kTile * sketcher.projections());
                   scratch.probes.resize(kTile);
                   scratch.keys.resize(kTile * parameters.bands);
                   for (std::size_t start = begin; start < end; start += kTile) {
                       const std::size_t count = std::min(kTile, end - start);
                       prepare(*this, blocks, plan, start, count, scratch);
                       for (std::size_t i = 0; i < count; ++i) {
                           answer(*this, scratch.sketches.data() + i * sketcher.projections(),
                                  scratch.probes[i], scratch.keys.data() + i * parameters.bands, k,
                                  scratch);
                           for (std::size_t j = 0; j < k; ++j) {
                               const bool has = j < scratch.answers.size();
                               const std::size_t at = (start + i) * k + j;
                               out_ids[at] = has ? scratch.answers[j].id : -1;
                               distances[at] = has ? scratch.answers[j].distance
                                                   : std::numeric_limits<double>::infinity();
                           }
                       }
                   }
               });
}

void IndexState::hashes(const BlockBatch& blocks, std::span<std::int32_t> out,
                        unsigned threads) const {
    check_batch(blocks);
    const std::size_t each = parameters.bands * parameters.band_rows;
    check_places(out.size(), blocks.count, each, "places", "hashes");
    const auto plan = sketcher.plan(blocks.row_stride, item_bytes(blocks.dtype));
    for_blocks(blocks.count, block_bytes(blocks), threads, [&](std::size_t begin, std::size_t end) {
        std::vector<std::int16_t> sketch(sketcher.projections());
        double rms_value = 0;
        for (std::size_t i = begin; i < end; ++i) {
            const Kind kind = sketcher.sketch(blocks, plan, i, sketch.data(), rms_value);
            for (std::size_t j = 0; j < each; ++j) {
                out[i * each + j] = kind == Kind::normal ? hashing.hash(sketch.data(), j)
                                                         : std::numeric_limits<std::int32_t>::min();
            }
        }
    });
}

}  // namespace pydedup::similarity
