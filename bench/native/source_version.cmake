# SPDX-License-Identifier: Apache-2.0
# Writes OUT with the version of pydedup and the commit of SOURCE; touches it only when they changed.
file(STRINGS ${SOURCE}/pyproject.toml version REGEX "^version = " LIMIT_COUNT 1)
string(REGEX REPLACE "^version = \"(.*)\"$" "\\1" version "${version}")
execute_process(COMMAND git -C ${SOURCE} describe --always --dirty --abbrev=12
  OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed)
  set(commit "")
endif()
set(text "#define PYDEDUP_SOURCE_VERSION \"${version}\"\n#define PYDEDUP_SOURCE_COMMIT \"${commit}\"\n")
set(old "")
if(EXISTS ${OUT})
  file(READ ${OUT} old)
endif()
if(NOT old STREQUAL text)
  file(WRITE ${OUT} "${text}")
endif()
