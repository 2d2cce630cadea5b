// SPDX-License-Identifier: Apache-2.0
// What the gate against weak symbols is tried on: see CMakeLists.txt of the folder above.

namespace pydedup {

// Every object that uses an inline function has a copy of its own, weak, and the linker keeps one
// for all: what happens when a kernel includes a header of the standard library.
#if defined(PYDEDUP_GATE_WEAK)
inline int shared_helper() { return 1; }
#else
static int shared_helper() { return 1; }
#endif

#if defined(PYDEDUP_GATE_TABLELESS)
int call() { return shared_helper(); }
#else
extern int (*const kGateKernels)();
int (*const kGateKernels)() = shared_helper;
#endif

}  // namespace pydedup
