// SPDX-License-Identifier: Apache-2.0
#include "bindings.hpp"

namespace pydedup {

void bind_packing(py::module_&) {}

}  // namespace pydedup
