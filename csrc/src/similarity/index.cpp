// SPDX-License-Identifier: Apache-2.0
// Changes of the index. A batch is checked before anything changes; room is made before anything is
// inserted, so that inserting cannot fail; what a later piece of a batch fails with undoes the
// earlier ones.
#include "similarity/index.hpp"

#include <bit>

#include "base/number_text.hpp"
#include "base/rounding.hpp"
#include "similarity/batch.hpp"

namespace pydedup::similarity {
namespace {

using detail::number_text;
using detail::round_up;

[[noreturn]] void refuse(const std::string& message) {
    throw Error(ErrorCode::invalid_argument, message);
}

LshParameters checked(const LshParameters& p) {
    static_cast<void>(dense_blocks(nullptr, 1, p.rows, p.cols, p.dtype));
    // A row takes whole groups of lanes; the signs of all are kept. (Also: a few damaged bytes must
    // not ask for gigabytes.)
    if (p.rows > (std::size_t{1} << 31) / round_up(p.cols, kSimLanes)) {
        refuse("block shape (" + std::to_string(p.rows) + ", " + std::to_string(p.cols) +
               ") has more than 2**31 elements, rows taken up to a multiple of " +
               std::to_string(kSimLanes));
    }
    if (!(p.r >= 1.0 / 128 && p.r <= 16)) {
        refuse("r is " + number_text(p.r) + "; choose a relative distance from 1/128 to 16");
    }
    if (p.bands < 1 || p.bands > 64) {
        refuse("bands is " + std::to_string(p.bands) + "; choose 1 to 64");
    }
    if (p.band_rows < 1 || p.band_rows > 64) {
        refuse("rows is " + std::to_string(p.band_rows) + "; choose 1 to 64 hashes per band");
    }
    if (p.bands * p.band_rows > 512) {
        refuse("bands * rows is " + std::to_string(p.bands * p.band_rows) +
               "; at most 512 hashes are kept per block");
    }
    return p;
}

}  // namespace

IndexState::IndexState(const LshParameters& p)
    : parameters(checked(p)),
      sketcher(p.rows, p.cols, p.dtype,
               std::max<std::size_t>(64, round_up(p.bands * p.band_rows, 32)), p.seed),
      hashing(p),
      bands(p.bands + 1),
      linked(p.bands + 1) {}

void IndexState::check_batch(const BlockBatch& blocks) const {
    if (blocks.dtype != parameters.dtype) {
        refuse("blocks have another dtype than the index");
    }
    if (blocks.rows != parameters.rows || blocks.cols != parameters.cols) {
        refuse("blocks of shape (" + std::to_string(blocks.rows) + ", " +
               std::to_string(blocks.cols) + ") do not fit an index of (" +
               std::to_string(parameters.rows) + ", " + std::to_string(parameters.cols) + ")");
    }
}

void IndexState::check_new(std::span<const std::int64_t> new_ids) const {
    bool ascending = true;
    for (std::size_t i = 0; i < new_ids.size(); ++i) {
        const std::int64_t id = new_ids[i];
        if (id < 0) refuse("ids holds " + std::to_string(id) + "; ids start at 0");
        if (numbers.find(id, member_ids) != kNone) {
            refuse("ids holds " + std::to_string(id) + ", which is in the index; remove it first");
        }
        ascending = ascending && (i == 0 || new_ids[i - 1] < id);
    }
    if (ascending) return;
    std::vector<std::int64_t> sorted(new_ids.begin(), new_ids.end());
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) {
        refuse("ids holds " + std::to_string(*twice) + " twice");
    }
}

// Room for that many more. Whatever comes of it, all groups are in all bands afterwards.
void IndexState::make_room(std::size_t more_groups, std::size_t more_members, unsigned threads) {
    const std::size_t n_groups = rms.size() + more_groups;
    const std::size_t n_members = member_ids.size() + more_members;
    if (n_members >= kNone) refuse("an index holds at most 2**32 - 2 blocks");
    reserve_more(sketches, n_groups * sketcher.projections());
    reserve_more(rms, n_groups);
    reserve_more(first_member, n_groups);
    reserve_more(last_member, n_groups);
    reserve_more(member_ids, n_members);
    reserve_more(members, n_members);
    numbers.grow(n_members, member_ids);
    try {
        for (std::size_t band = 0; band < bands.size(); ++band) {
            if (bands[band].grow(n_groups)) linked[band] = 0;
        }
    } catch (...) {  // those that grew are empty: nothing could be erased from them
        link_groups(threads);
        throw;
    }
    link_groups(threads);
}

std::uint64_t IndexState::twin_key(const std::int16_t* sketch, double rms_value) const noexcept {
    auto sum = std::bit_cast<std::uint64_t>(rms_value) ^ parameters.seed;
    for (std::size_t i = 0; i < sketcher.projections(); i += 4) {
        std::uint64_t word;
        std::memcpy(&word, sketch + i, sizeof word);
        sum = (std::rotl(sum, 23) ^ word) * 0x9E3779B97F4A7C15ULL;
    }
    sum = (sum ^ (sum >> 32)) * 0xD6E8FEB86659FD93ULL;
    return sum ^ (sum >> 32);
}

std::uint32_t IndexState::twin_of(const std::int16_t* sketch, const Probe& probe) const noexcept {
    const std::size_t bytes = sketcher.projections() * sizeof(std::int16_t);
    std::uint32_t group = bands.back().first(probe.twin_key);
    for (; group != kNone; group = bands.back().next(group)) {
        if (rms[group] == probe.rms && std::memcmp(sketch_of(group), sketch, bytes) == 0) break;
    }
    return group;
}

std::uint32_t IndexState::append_group(const std::int16_t* sketch, const Probe& probe) noexcept {
    const auto group = static_cast<std::uint32_t>(rms.size());
    sketches.insert(sketches.end(), sketch, sketch + sketcher.projections());
    rms.push_back(probe.rms);
    first_member.push_back(kNone);
    last_member.push_back(kNone);
    bands.back().append(probe.twin_key, group);
    linked.back() = rms.size();
    return group;
}

void IndexState::append_member(std::int64_t id, std::uint32_t group) noexcept {
    std::uint32_t number = first_free;
    if (number != kNone) {
        first_free = members[number].next;
        --free_members;
    } else {
        number = static_cast<std::uint32_t>(member_ids.size());
        member_ids.push_back(0);
        members.push_back({});
    }
    member_ids[number] = id;
    members[number] = {group, kNone, kNone};
    if (group != kNone) {
        const std::uint32_t last = last_member[group];
        members[number].prev = last;
        (last == kNone ? first_member[group] : members[last].next) = number;
        last_member[group] = number;
    }
    numbers.insert(id, number);
}

void IndexState::insert(std::int64_t id, const std::int16_t* sketch, const Probe& probe) noexcept {
    std::uint32_t group = kNone;
    if (probe.kind != Kind::not_finite) {
        group = twin_of(sketch, probe);
        if (group == kNone) group = append_group(sketch, probe);
    }
    append_member(id, group);
}

// Appends the groups that a band does not have yet. The places where a few of them go are asked for
// before the first is written: they lie anywhere.
void IndexState::link_band(std::size_t band) noexcept {
    constexpr std::size_t kTile = 32;
    const bool whole = band == parameters.bands;
    Chains& chains = bands[band];
    for (std::size_t start = linked[band]; start < rms.size(); start += kTile) {
        std::uint64_t keys[kTile];
        const std::size_t count = std::min(kTile, rms.size() - start);
        for (std::size_t i = 0; i < count; ++i) {
            const std::int16_t* sketch = sketch_of(start + i);
            keys[i] = whole ? twin_key(sketch, rms[start + i]) : hashing.key(sketch, band);
            chains.prefetch_head(keys[i]);
        }
        for (std::size_t i = 0; i < count; ++i) {
            const std::uint32_t head = chains.first(keys[i]);
            if (head != kNone) chains.prefetch_link(head);
        }
        for (std::size_t i = 0; i < count; ++i) {
            const std::size_t group = start + i;
            if (first_member[group] == kNone) continue;  // dead
            if (!whole && rms[group] == 0) continue;     // zero blocks are near to each other alone
            chains.append(keys[i], static_cast<std::uint32_t>(group));
        }
    }
    linked[band] = rms.size();
}

void IndexState::link_groups(unsigned threads) noexcept {
    // About 50 ns per group and band, most of it waiting for memory.
    const std::size_t work = (rms.size() - linked.front()) * bands.size();
    const unsigned workers = work < 4096 ? 1 : thread_count(threads);
    parallel_for(bands.size(), 1, workers, [&](std::size_t begin, std::size_t end) {
        for (std::size_t band = begin; band < end; ++band) link_band(band);
    });
}

void IndexState::add(const BlockBatch& blocks, std::span<const std::int64_t> new_ids,
                     unsigned threads) {
    constexpr std::size_t kPiece = 4096;
    check_batch(blocks);
    check_count(new_ids.size(), blocks.count, "ids", "blocks");
    check_new(new_ids);
    const std::size_t length = sketcher.projections();
    const std::size_t piece = std::min(kPiece, blocks.count);
    std::vector<std::int16_t> found(piece * length);
    std::vector<Probe> probes(piece);
    const auto plan = sketcher.plan(blocks.row_stride, item_bytes(blocks.dtype));
    std::size_t added = 0;
    try {
        for (std::size_t start = 0; start < blocks.count; start += kPiece) {
            const std::size_t count = std::min(kPiece, blocks.count - start);
            for_blocks(
                count, block_bytes(blocks), threads, [&](std::size_t begin, std::size_t end) {
                    for (std::size_t i = begin; i < end; ++i) {
                        std::int16_t* sketch = found.data() + i * length;
                        Probe& probe = probes[i];
                        probe.kind = sketcher.sketch(blocks, plan, start + i, sketch, probe.rms);
                        probe.twin_key = twin_key(sketch, probe.rms);
                    }
                });
            make_room(count, count, threads);
            for (std::size_t i = 0; i < count; ++i) {
                if (i + 8 < count) bands.back().prefetch_head(probes[i + 8].twin_key);
                insert(new_ids[start + i], found.data() + i * length, probes[i]);
            }
            added = start + count;
            link_groups(threads);
        }
    } catch (...) {
        for (std::size_t i = 0; i < added; ++i) erase(new_ids[i]);
        renumber();
        throw;
    }
}

void IndexState::erase(std::int64_t id) noexcept {
    const std::uint32_t number = numbers.find(id, member_ids);
    numbers.erase(id, member_ids);
    const Member member = members[number];
    if (member.group != kNone) {
        const std::uint32_t group = member.group;
        (member.prev == kNone ? first_member[group] : members[member.prev].next) = member.next;
        (member.next == kNone ? last_member[group] : members[member.next].prev) = member.prev;
        if (first_member[group] == kNone) {
            ++dead_groups;
            bands.back().erase(twin_key(sketch_of(group), rms[group]), group);
            for (std::size_t band = 0; band < parameters.bands && rms[group] != 0; ++band) {
                bands[band].erase(hashing.key(sketch_of(group), band), group);
            }
        }
    }
    members[number].next = first_free;
    first_free = number;
    ++free_members;
}

std::vector<bool> IndexState::free_places() const {
    std::vector<bool> is_free(members.size());
    for (std::uint32_t m = first_free; m != kNone; m = members[m].next) is_free[m] = true;
    return is_free;
}

void IndexState::merge(const IndexState& other, unsigned threads) {
    const LshParameters& a = parameters;
    const LshParameters& b = other.parameters;
    if (a.dtype != b.dtype || a.rows != b.rows || a.cols != b.cols || a.r != b.r ||
        a.bands != b.bands || a.band_rows != b.band_rows || a.seed != b.seed) {
        refuse(
            "other must have the block shape, dtype, r, bands, rows and seed of this index to be "
            "merged");
    }
    // Nothing below asks for memory: a group that is in no band cannot be erased.
    const std::vector<bool> is_free = other.free_places();
    make_room(other.rms.size() - other.dead_groups, other.size(), threads);
    const auto insert_new = [&](std::int64_t id, const std::int16_t* sketch, const Probe& probe) {
        if (numbers.find(id, member_ids) == kNone) insert(id, sketch, probe);
    };
    for (std::size_t g = 0; g < other.rms.size(); ++g) {
        if (other.first_member[g] == kNone) continue;  // dead
        const std::int16_t* const sketch = other.sketch_of(g);
        const Probe probe = other.probe_of(static_cast<std::uint32_t>(g));
        for (std::uint32_t m = other.first_member[g]; m != kNone; m = other.members[m].next) {
            insert_new(other.member_ids[m], sketch, probe);
        }
    }
    for (std::size_t m = 0; m < other.members.size(); ++m) {
        if (is_free[m] || other.members[m].group != kNone) continue;
        insert_new(other.member_ids[m], nullptr, other.probe_of(kNone));
    }
    link_groups(threads);
}

void IndexState::select_from(const IndexState& other, std::span<const std::int64_t> old_ids,
                             std::span<const std::int64_t> new_ids) {
    check_count(new_ids.size(), old_ids.size(), "new_ids", "ids");
    check_new(new_ids);
    make_room(old_ids.size(), old_ids.size(), 1);
    for (std::size_t i = 0; i < old_ids.size(); ++i) {
        const std::uint32_t member = other.numbers.find(old_ids[i], other.member_ids);
        if (member == kNone) {
            refuse("ids holds " + std::to_string(old_ids[i]) + ", which is not in the index");
        }
        const std::uint32_t group = other.members[member].group;
        insert(new_ids[i], group == kNone ? nullptr : other.sketch_of(group),
               other.probe_of(group));
    }
    link_groups(1);
}

Probe IndexState::probe_of(std::uint32_t group) const noexcept {
    if (group == kNone) return {0.0, Kind::not_finite, 0};
    return {rms[group], rms[group] == 0 ? Kind::zero : Kind::normal,
            twin_key(sketch_of(group), rms[group])};
}

void IndexState::remove(std::span<const std::int64_t> old_ids) {
    std::vector<std::int64_t> sorted(old_ids.begin(), old_ids.end());
    std::sort(sorted.begin(), sorted.end());
    for (std::size_t i = 0; i < sorted.size(); ++i) {
        if (i != 0 && sorted[i] == sorted[i - 1]) {
            refuse("ids holds " + std::to_string(sorted[i]) + " twice");
        }
        if (numbers.find(sorted[i], member_ids) == kNone) {
            refuse("ids holds " + std::to_string(sorted[i]) + ", which is not in the index");
        }
    }
    for (const std::int64_t id : old_ids) erase(id);
    if (dead_groups > 1024 && dead_groups > rms.size() / 4) renumber();
}

// Gives the numbers of dead groups back: the living keep their order, so chains do too.
void IndexState::renumber() noexcept {
    const std::size_t length = sketcher.projections();
    std::size_t to = 0;
    for (std::size_t from = 0; from < rms.size(); ++from) {
        if (first_member[from] == kNone) continue;
        if (from != to) {
            std::copy_n(sketches.data() + from * length, length, sketches.data() + to * length);
            rms[to] = rms[from];
            first_member[to] = first_member[from];
            last_member[to] = last_member[from];
            for (std::uint32_t m = first_member[to]; m != kNone; m = members[m].next) {
                members[m].group = static_cast<std::uint32_t>(to);
            }
        }
        ++to;
    }
    sketches.resize(to * length);
    rms.resize(to);
    first_member.resize(to);
    last_member.resize(to);
    dead_groups = 0;
    for (std::size_t band = 0; band < bands.size(); ++band) {
        bands[band].clear();
        linked[band] = 0;
    }
    link_groups(0);
}

std::size_t IndexState::memory_bytes() const noexcept {
    std::size_t bytes = sizeof(IndexState) + sketcher.memory_bytes() + numbers.memory_bytes();
    bytes += sketches.capacity() * sizeof(std::int16_t) + rms.capacity() * sizeof(double);
    bytes += (first_member.capacity() + last_member.capacity()) * sizeof(std::uint32_t);
    bytes += member_ids.capacity() * sizeof(std::int64_t);
    bytes += members.capacity() * sizeof(Member);
    for (const Chains& chains : bands) bytes += chains.memory_bytes();
    return bytes;
}

}  // namespace pydedup::similarity
