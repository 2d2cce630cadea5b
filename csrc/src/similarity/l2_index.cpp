// SPDX-License-Identifier: Apache-2.0
// The public class: locks around the state, so that it is safe between threads.
#include <algorithm>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <utility>

#include "pydedup/similarity.hpp"
#include "similarity/index.hpp"

namespace pydedup {

using similarity::IndexState;
using similarity::kNone;

L2Index::L2Index(const LshParameters& parameters)
    : state_(std::make_unique<IndexState>(parameters)) {}
L2Index::L2Index(std::unique_ptr<IndexState> state) : state_(std::move(state)) {}
L2Index::~L2Index() = default;

const LshParameters& L2Index::parameters() const noexcept { return state_->parameters; }

std::size_t L2Index::size() const noexcept {
    const std::shared_lock lock(state_->mutex);
    return state_->size();
}

std::size_t L2Index::memory_bytes() const noexcept {
    const std::shared_lock lock(state_->mutex);
    return state_->memory_bytes();
}

bool L2Index::contains(std::int64_t id) const {
    const std::shared_lock lock(state_->mutex);
    return state_->numbers.find(id, state_->member_ids) != kNone;
}

std::vector<std::int64_t> L2Index::ids() const {
    const std::shared_lock lock(state_->mutex);
    const std::vector<bool> is_free = state_->free_places();
    std::vector<std::int64_t> all;
    all.reserve(state_->size());
    for (std::size_t m = 0; m < is_free.size(); ++m) {
        if (!is_free[m]) all.push_back(state_->member_ids[m]);
    }
    std::sort(all.begin(), all.end());
    return all;
}

void L2Index::add(const BlockBatch& blocks, std::span<const std::int64_t> new_ids,
                  unsigned threads) {
    const std::unique_lock lock(state_->mutex);
    state_->add(blocks, new_ids, threads);
}

void L2Index::merge(const L2Index& other, unsigned threads) {
    if (&other == this) return;
    // Two threads that merge two indexes into each other must not wait for each other.
    std::unique_lock lock(state_->mutex, std::defer_lock);
    std::shared_lock from(other.state_->mutex, std::defer_lock);
    if (this < &other) {
        lock.lock();
        from.lock();
    } else {
        from.lock();
        lock.lock();
    }
    state_->merge(*other.state_, threads);
}

std::unique_ptr<L2Index> L2Index::select(std::span<const std::int64_t> ids,
                                         std::span<const std::int64_t> new_ids) const {
    auto selected = std::make_unique<IndexState>(state_->parameters);
    {
        const std::shared_lock lock(state_->mutex);
        selected->select_from(*state_, ids, new_ids);
    }
    return std::unique_ptr<L2Index>(new L2Index(std::move(selected)));
}

void L2Index::remove(std::span<const std::int64_t> old_ids) {
    const std::unique_lock lock(state_->mutex);
    state_->remove(old_ids);
}

void L2Index::query(const BlockBatch& blocks, std::size_t k, std::span<std::int64_t> ids,
                    std::span<double> distances, unsigned threads) const {
    const std::shared_lock lock(state_->mutex);
    state_->query(blocks, k, ids, distances, threads);
}

void L2Index::hashes(const BlockBatch& blocks, std::span<std::int32_t> out,
                     unsigned threads) const {
    state_->hashes(blocks, out, threads);  // reads nothing that changes
}

std::vector<std::byte> L2Index::save() const {
    const std::shared_lock lock(state_->mutex);
    return state_->save();
}

}  // namespace pydedup
