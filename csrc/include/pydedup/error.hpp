// SPDX-License-Identifier: Apache-2.0
// The one way the core reports bad input or bad data. Kernels never fail; facades throw Error
// before they call one. The bindings translate each code to a Python exception, once.
#pragma once

#include <stdexcept>
#include <string>

namespace pydedup {

enum class ErrorCode {
    invalid_argument,    ///< a caller's value is out of range or inconsistent
    corrupt_page,        ///< stored bytes do not parse or do not match their checksum
    unsupported_format,  ///< written by a newer version of the format
    out_of_budget,       ///< a memory budget does not allow the request
    kernel_unavailable,  ///< a demanded kernel is unknown, not built, or not runnable here
};

class Error : public std::runtime_error {
  public:
    Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
    [[nodiscard]] ErrorCode code() const noexcept { return code_; }

  private:
    ErrorCode code_;
};

}  // namespace pydedup
