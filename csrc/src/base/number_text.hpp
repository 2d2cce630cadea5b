// SPDX-License-Identifier: Apache-2.0
// Numbers in messages. std::to_string knows six digits: a billionth is 0.000000 to it.
#pragma once

#include <array>
#include <charconv>
#include <string>

namespace pydedup::detail {

/// The shortest text that reads back as the number.
[[nodiscard]] inline std::string number_text(double number) {
    std::array<char, 32> text{};
    const auto written = std::to_chars(text.data(), text.data() + text.size(), number);
    return {text.data(), written.ptr};
}

}  // namespace pydedup::detail
