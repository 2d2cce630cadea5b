// SPDX-License-Identifier: Apache-2.0
// State of an L2Index. A *group* is a distinct sketch: projections and root mean square; its
// *members* are the blocks that have it, in order of addition. Only groups are in the bands, so any
// number of identical blocks costs a query no more than one. Groups are numbered in order of
// creation; a dead one (without members) is unlinked at once and its number is given back when all
// are renumbered in order, which happens after a quarter has died.
//
// Every band is a table of chains of groups; one more table (the last) finds the group of a sketch.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "similarity/sketch.hpp"
#include "similarity/tables.hpp"

namespace pydedup::similarity {

/// h = floor((a . v + b) / r) on integer projections, and the bands' keys.
class Hashing {
  public:
    explicit Hashing(const LshParameters& parameters);

    [[nodiscard]] std::size_t bands() const noexcept { return bands_; }
    [[nodiscard]] std::size_t band_rows() const noexcept { return band_rows_; }
    [[nodiscard]] std::uint64_t key(const std::int16_t* sketch, std::size_t band) const noexcept;
    [[nodiscard]] std::int32_t hash(const std::int16_t* sketch, std::size_t j) const noexcept {
        return static_cast<std::int32_t>(raised(sketch, j)) - raise_ / width_;
    }

    /// Per hash, the least projection that hashes as that of `sketch` does.
    void lows(const std::int16_t* sketch, std::int32_t* out) const noexcept;
    /// Whether `sketch` has all hashes of the band in common with the one that `lows` is of.
    [[nodiscard]] bool same_band(const std::int16_t* sketch, const std::int32_t* lows,
                                 std::size_t band) const noexcept;

  private:
    // The hash, raised by a constant so that it is not negative; the division is exact (value and
    // width are below 2^18 and 2^16, the reciprocal is rounded up to 40 bits).
    [[nodiscard]] std::uint32_t raised(const std::int16_t* sketch, std::size_t j) const noexcept {
        const std::int32_t shifted = sketch[j] + shifts_[j];
        const auto value = static_cast<std::uint64_t>(shifted);
        return static_cast<std::uint32_t>(value * reciprocal_ >> 40);
    }

    std::size_t bands_, band_rows_;
    std::int32_t width_;  // r in units of a sketch
    std::int32_t raise_;  // a multiple of width_, at least kSketchMost
    std::uint64_t reciprocal_;
    std::vector<std::int32_t> shifts_;  // b, plus raise_
    std::vector<std::uint64_t> factors_;
};

/// A block's sketch while it is being added or looked up.
struct Probe {
    double rms;
    Kind kind;
    std::uint64_t twin_key;
};

struct Member {
    std::uint32_t group;  // kNone: a block that is not finite
    std::uint32_t next, prev;
};

/// A shared mutex at which nobody starves: who comes after a waiting writer waits behind it. (That
/// of glibc lets readers pass, so a writer could wait for as long as queries overlap.)
class FairMutex {
  public:
    void lock() {
        const std::lock_guard turn(gate_);
        mutex_.lock();
    }
    void unlock() { mutex_.unlock(); }
    void lock_shared() {
        const std::lock_guard turn(gate_);
        mutex_.lock_shared();
    }
    void unlock_shared() { mutex_.unlock_shared(); }

  private:
    std::mutex gate_;
    std::shared_mutex mutex_;
};

struct IndexState {
    explicit IndexState(const LshParameters& p);

    // index.cpp
    void check_batch(const BlockBatch& blocks) const;
    void add(const BlockBatch& blocks, std::span<const std::int64_t> new_ids, unsigned threads);
    void merge(const IndexState& other, unsigned threads);
    void select_from(const IndexState& other, std::span<const std::int64_t> old_ids,
                     std::span<const std::int64_t> new_ids);
    [[nodiscard]] Probe probe_of(std::uint32_t group) const noexcept;
    void remove(std::span<const std::int64_t> old_ids);
    void check_new(std::span<const std::int64_t> new_ids) const;
    void make_room(std::size_t more_groups, std::size_t more_members, unsigned threads);
    void insert(std::int64_t id, const std::int16_t* sketch, const Probe& probe) noexcept;
    std::uint32_t append_group(const std::int16_t* sketch, const Probe& probe) noexcept;
    void append_member(std::int64_t id, std::uint32_t group) noexcept;
    void erase(std::int64_t id) noexcept;
    void link_band(std::size_t band) noexcept;
    void link_groups(unsigned threads) noexcept;
    void renumber() noexcept;
    [[nodiscard]] std::uint64_t twin_key(const std::int16_t* sketch, double rms) const noexcept;
    [[nodiscard]] std::uint32_t twin_of(const std::int16_t* sketch,
                                        const Probe& probe) const noexcept;
    [[nodiscard]] std::size_t memory_bytes() const noexcept;

    // query.cpp
    void query(const BlockBatch& blocks, std::size_t k, std::span<std::int64_t> out_ids,
               std::span<double> distances, unsigned threads) const;
    void hashes(const BlockBatch& blocks, std::span<std::int32_t> out, unsigned threads) const;

    // serialise.cpp
    [[nodiscard]] std::vector<std::byte> save() const;

    [[nodiscard]] const std::int16_t* sketch_of(std::size_t group) const noexcept {
        return sketches.data() + group * sketcher.projections();
    }
    /// Which places of members are free.
    [[nodiscard]] std::vector<bool> free_places() const;
    [[nodiscard]] std::size_t size() const noexcept { return member_ids.size() - free_members; }

    LshParameters parameters;
    Sketcher sketcher;
    Hashing hashing;
    mutable FairMutex mutex;

    // groups
    std::vector<std::int16_t> sketches;
    std::vector<double> rms;
    std::vector<std::uint32_t> first_member, last_member;  // kNone: dead
    std::size_t dead_groups = 0;
    std::vector<Chains> bands;        // and that of whole sketches, the last
    std::vector<std::size_t> linked;  // groups that are in that band's chains

    // members
    std::vector<std::int64_t> member_ids;
    std::vector<Member> members;
    std::uint32_t first_free = kNone;
    std::size_t free_members = 0;
    IdMap numbers;
};

}  // namespace pydedup::similarity
