// SPDX-License-Identifier: Apache-2.0
// Runs of lanes, copied 16 bytes at a time, which is cheaper than a call of memcpy. An -inl file
// includes this INSIDE its own anonymous namespace.

void copy_runs(const float* from, std::size_t ld, std::size_t columns, const LaneRun* runs,
               std::size_t n, float* to, std::size_t ld_to) noexcept {
    constexpr std::size_t kStep = 4;
    for (std::size_t c = 0; c < columns; ++c, from += ld, to += ld_to) {
        for (const LaneRun* run = runs; run < runs + n; ++run) {
            float* const lanes = to + run->to;
            const float* const elements = from + run->from;
            std::size_t i = 0;
            for (; i < run->begin; ++i) lanes[i] = 0.0F;
            for (; i + kStep <= run->end; i += kStep) {
                __builtin_memcpy(lanes + i, elements + (i - run->begin), kStep * sizeof(float));
            }
            for (; i < run->end; ++i) lanes[i] = elements[i - run->begin];
            for (; i < run->count; ++i) lanes[i] = 0.0F;
        }
    }
}
