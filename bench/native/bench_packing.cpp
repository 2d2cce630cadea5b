// SPDX-License-Identifier: Apache-2.0
// Problems of the paper's shape (PAPER.md, "Page packing"), and large ones. Owner sets are made by
// a rule, not measured: every model shares most blocks with all and has some of its own.
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "harness.hpp"
#include "pydedup/packing.hpp"

namespace bench {
namespace {

struct Problem {
    std::vector<std::int64_t> indptr{0};
    std::vector<std::int64_t> ids;
};

std::shared_ptr<Problem> problem(std::size_t models, std::size_t blocks) {
    auto made = std::make_shared<Problem>();
    std::vector<std::vector<std::int64_t>> owned(models);
    std::minstd_rand random(7);
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    for (std::size_t block = 0; block < blocks; ++block) {
        const double kind = uniform(random);
        if (kind < 0.5 && models <= 16) {  // all models: an untouched part of the base
            for (auto& list : owned) list.push_back(static_cast<std::int64_t>(block));
        } else if (kind < 0.7) {  // a family of neighbours
            const auto first =
                static_cast<std::size_t>(uniform(random) * static_cast<double>(models));
            for (std::size_t i = 0; i < 3; ++i) {
                auto& list = owned[(first + i) % models];
                if (list.empty() || list.back() != static_cast<std::int64_t>(block)) {
                    list.push_back(static_cast<std::int64_t>(block));
                }
            }
        } else {  // one model's own
            owned[static_cast<std::size_t>(uniform(random) * static_cast<double>(models))]
                .push_back(static_cast<std::int64_t>(block));
        }
    }
    for (const auto& list : owned) {
        made->ids.insert(made->ids.end(), list.begin(), list.end());
        made->indptr.push_back(static_cast<std::int64_t>(made->ids.size()));
    }
    return made;
}

Workload packing(const std::string& name, std::size_t models, std::size_t blocks,
                 pydedup::PackAlgorithm algorithm) {
    auto made = problem(models, blocks);
    return {name,
            std::to_string(models) + " models, " + std::to_string(blocks) + " blocks, pages of 64",
            0,
            0,
            static_cast<double>(blocks),
            [made, algorithm] {
                pydedup::PackRequest request{{made->indptr, made->ids}, 64};
                request.algorithm = algorithm;
                keep(pack_pages(request).page_ids.size());
            }};
}

Entry entry(const std::string& name, std::size_t models, std::size_t blocks,
            pydedup::PackAlgorithm algorithm) {
    return {name, [=] { return packing(name, models, blocks, algorithm); }};
}

}  // namespace

std::vector<Entry> packing_entries() {
    using enum pydedup::PackAlgorithm;
    return {
        entry("pack.layout-6x8600", 6, 8600, layout),
        entry("pack.two-stage-6x8600", 6, 8600, two_stage),
        entry("pack.greedy1-6x8600", 6, 8600, greedy1),
        entry("pack.greedy2-6x8600", 6, 8600, greedy2),
        entry("pack.baseline-6x8600", 6, 8600, baseline),
        entry("pack.layout-10x1M", 10, 1000000, layout),
        entry("pack.layout-1000x1M", 1000, 1000000, layout),
    };
}

}  // namespace bench
