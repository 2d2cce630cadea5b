# SPDX-License-Identifier: Apache-2.0
# Fails the build when a kernel object defines a weak symbol (see PydedupKernels.cmake).
execute_process(COMMAND ${NM} --defined-only ${OBJECTS} OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "nm could not read ${OBJECTS}")
endif()
string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
if(weak)
  message(FATAL_ERROR "weak symbols in kernel object ${OBJECTS}:\n${weak}")
endif()
