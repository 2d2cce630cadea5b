// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/gemm_kernels.hpp"

namespace pydedup {

/// While it lives, its thread may call the tiles of these kernels.
class TileRegisters {
  public:
    explicit TileRegisters(const Bf16GemmKernels& kernels) noexcept : leave_(kernels.leave) {
        if (kernels.enter != nullptr) kernels.enter();
    }
    ~TileRegisters() {
        if (leave_ != nullptr) leave_();
    }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;

  private:
    void (*leave_)() noexcept;
};

}  // namespace pydedup
