// SPDX-License-Identifier: Apache-2.0
// Partition refinement: all blocks start in one class; each model splits every class it touches
// into the part it owns and the rest. After the last model two blocks share a class exactly when no
// model told them apart, i.e. when their owner sets are equal.
#include "packing/classes.hpp"

#include <utility>

namespace pydedup::packing {
namespace {

/// Per block the number of its class; numbers have holes and follow no order. Blocks nobody owns
/// keep class 0, which no owned block keeps.
std::vector<Index> refine(const Rows& owned, std::size_t blocks) {
    std::vector<Index> class_of(blocks, 0);
    std::vector<std::uint64_t> count{blocks + 1};  // one more than there is: class 0 stays taken
    std::vector<Index> split_to{kNone};            // valid while split_by is the current model
    std::vector<Index> split_by{kNone};
    std::vector<Index> free;
    std::vector<Index> touched;
    for (Index m = 0; m < owned.size(); ++m) {
        touched.clear();
        for (const Index b : owned.row(m)) {
            const Index from = class_of[b];
            if (split_by[from] != m) {
                split_by[from] = m;
                touched.push_back(from);
                if (free.empty()) {
                    split_to[from] = static_cast<Index>(count.size());
                    count.push_back(0);
                    split_to.push_back(kNone);
                    split_by.push_back(kNone);
                } else {
                    split_to[from] = free.back();
                    free.pop_back();
                    split_by[split_to[from]] = kNone;
                }
            }
            class_of[b] = split_to[from];
            --count[from];
            ++count[class_of[b]];
        }
        // Only now: a number freed earlier could be given to a part of a class still being split.
        for (const Index c : touched) {
            if (count[c] == 0) free.push_back(c);
        }
    }
    return class_of;
}

}  // namespace

Classes find_classes(const Rows& owned, std::size_t blocks) {
    std::vector<Index> class_of = refine(owned, blocks);
    Classes classes;

    // Renumber by first block: the result does not depend on the order of the models.
    std::vector<Index> number;
    std::vector<Index> first;
    std::vector<std::uint64_t> begin{0};
    for (Index b = 0; b < blocks; ++b) {
        Index& c = class_of[b];
        if (c == 0) {
            c = kNone;
            continue;
        }
        if (c >= number.size()) number.resize(c + std::size_t{1}, kNone);
        if (number[c] == kNone) {
            number[c] = static_cast<Index>(first.size());
            first.push_back(b);
            begin.push_back(0);
        }
        c = number[c];
        ++begin[c + std::size_t{1}];
    }
    for (std::size_t c = 1; c < begin.size(); ++c) begin[c] += begin[c - 1];
    classes.members.indptr = begin;
    classes.members.items.resize(begin.back());
    for (Index b = 0; b < blocks; ++b) {
        if (class_of[b] != kNone) classes.members.items[begin[class_of[b]]++] = b;
    }

    std::vector<std::uint64_t>& ends = classes.owners.indptr;
    ends.assign(first.size() + 1, 0);
    const auto each_owner = [&](const auto& visit) {
        for (Index m = 0; m < owned.size(); ++m) {
            for (const Index b : owned.row(m)) {
                if (first[class_of[b]] == b) visit(class_of[b], m);
            }
        }
    };
    each_owner([&](Index c, Index) { ++ends[c + std::size_t{1}]; });
    for (std::size_t c = 1; c < ends.size(); ++c) ends[c] += ends[c - 1];
    classes.owners.items.resize(ends.back());
    std::vector<std::uint64_t> at(ends.begin(), ends.end() - 1);
    each_owner([&](Index c, Index m) { classes.owners.items[at[c]++] = m; });
    return classes;
}

}  // namespace pydedup::packing
