// SPDX-License-Identifier: Apache-2.0
// What a process has one of, and a forked child must not share with its parent.
#pragma once

#include <atomic>
#include <new>

namespace pydedup {

/// The T of this process, made when it is first asked for, or nullptr without memory. It is never
/// destroyed: threads may use it until the process ends. A forked child, in which the mutexes of
/// its parent's may be locked forever, leaves that alone and makes one of its own:
/// T::is_of_this_process() tells which it is.
template <class T>
[[nodiscard]] T* of_this_process() noexcept {
    static std::atomic<T*> current{nullptr};
    T* made = current.load(std::memory_order_acquire);
    while (made == nullptr || !made->is_of_this_process()) {
        T* const fresh = new (std::nothrow) T;
        if (fresh == nullptr) return nullptr;
        if (current.compare_exchange_strong(made, fresh, std::memory_order_acq_rel)) return fresh;
        delete fresh;  // another thread was first; nobody has used this one
    }
    return made;
}

}  // namespace pydedup
