// SPDX-License-Identifier: Apache-2.0
// The four algorithms of the paper (PVLDB 15(10), 2022, section on page packing). Every model is
// exactly the union of the pages it reads, so blocks may be stored several times. They are the
// baselines for layout.cpp. Private to src/packing.
#pragma once

#include "packing/problem.hpp"

namespace pydedup::packing {

struct ExactPages {
    Rows pages;
    Rows reads;  // per model its pages, ascending
};

[[nodiscard]] ExactPages pack_baseline(const Problem& problem);
[[nodiscard]] ExactPages pack_greedy1(const Problem& problem);
[[nodiscard]] ExactPages pack_greedy2(const Problem& problem);
[[nodiscard]] ExactPages pack_two_stage(const Problem& problem);

}  // namespace pydedup::packing
