// SPDX-License-Identifier: Apache-2.0
// Giving the GIL away and taking it, also while the interpreter ends. Then Python 3.11 to 3.13 end
// a thread that asks for the GIL with pthread_exit: which unwinds, through destructors that need
// the GIL or may not throw, and the process aborts. Such a thread (a daemon thread, or one that the
// program did not join) rather stops where it is, as it does in Python 3.14, until the process has
// ended. It must not hold a lock of the core meanwhile.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace pydedup {

template <class Take>
void take_gil_or_stop(const Take& take) noexcept {
    try {
        take();
    } catch (...) {  // nothing in it throws: this thread is being ended
        for (;;) ::pause();
    }
}

/// Without the GIL for as long as it lives. Made by a thread that has it.
class WithoutGil {
  public:
    WithoutGil() noexcept : state_(PyEval_SaveThread()) {}
    ~WithoutGil() {
        take_gil_or_stop([this] { PyEval_RestoreThread(state_); });
    }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

  private:
    PyThreadState* state_;
};

/// With the GIL for as long as it lives, on any thread, whether that has it already or not.
class WithGil {
  public:
    WithGil() noexcept {
        take_gil_or_stop([this] { state_ = PyGILState_Ensure(); });
    }
    ~WithGil() { PyGILState_Release(state_); }
    WithGil(const WithGil&) = delete;
    WithGil& operator=(const WithGil&) = delete;

  private:
    PyGILState_STATE state_{};
};

}  // namespace pydedup
