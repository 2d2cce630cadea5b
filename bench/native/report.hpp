// SPDX-License-Identifier: Apache-2.0
// How results are shown: lines for people, or one JSON document (docs in CONTRIBUTING.md).
#pragma once

#include <string>
#include <vector>

#include "harness.hpp"
#include "machine.hpp"

namespace bench {

[[nodiscard]] std::string heading(const Machine& machine, const std::string& kernel);
[[nodiscard]] std::string line(const Result& result, const Machine& machine);
[[nodiscard]] std::string json_document(const std::vector<Result>& results, const Machine& machine,
                                        const std::string& kernel, double seconds);

}  // namespace bench
