# SPDX-License-Identifier: Apache-2.0
# Fails the build when a kernel object defines a weak symbol (see PydedupKernels.cmake), or when its
# table is not to be seen in it: then the object was not what nm can read (e.g. link-time bytecode),
# and nothing was checked.
#   cmake -DNM=<nm of the toolchain> -DOBJECTS=<object files> -P CheckNoWeakSymbols.cmake
execute_process(COMMAND ${NM} --defined-only ${OBJECTS} OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "nm could not read ${OBJECTS}")
endif()
# W, V: weak; u: unique global, which is shared over the whole process.
string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
if(weak)
  list(JOIN weak "\n" weak)
  message(FATAL_ERROR "weak symbols in kernel object ${OBJECTS}:\n${weak}")
endif()
if(NOT symbols MATCHES " [RDBG] [^\n]*Kernels")
  message(FATAL_ERROR "no kernel table in kernel object ${OBJECTS}; nm saw:\n${symbols}")
endif()
