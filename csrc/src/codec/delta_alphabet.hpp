// SPDX-License-Identifier: Apache-2.0
// Which differences of a block get a symbol of their own. Private to codec/.
#pragma once

#include "codec/delta_plan.hpp"

namespace pydedup::detail {

/// Chooses an alphabet that covers all differences and writes the symbol of each.
void choose_alphabet(const Differences& differences, Alphabet& alphabet, std::uint8_t* symbols);

/// The same with the dictionary of another block's alphabet, whatever is frequent here.
void reuse_alphabet(const Differences& differences, const Alphabet& like, Alphabet& alphabet,
                    std::uint8_t* symbols);

}  // namespace pydedup::detail
