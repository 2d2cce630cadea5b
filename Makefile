# SPDX-License-Identifier: Apache-2.0
# The commands of this repository. They do their work in scripts/, print what they are doing, and
# keep what the tools said in build/logs/.
#
#   PYTHON=python3.12   which interpreter (at least 3.11; default: 3.11, else the newest found)
#   VENV=.venv          where the virtual environment is made
#   JOBS=2              how many compilers run at once (default: one per core); of pytests, one more
#   ARGS="..."          further arguments of `make demo` (for the demo) and `make test` (for pytest)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

VENV ?= .venv
export PYTHON VENV JOBS
ARGS ?=
CRASH_ROUNDS ?= 200
SECONDS ?= 1800
SANITIZERS ?= asan-ubsan tsan
export FUZZ_SECONDS

.PHONY: help
help:  ## say what the commands are
	@echo "pydedup: make <command>"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do printf '  %-17s %s\n' "$$name" "$$text"; done

# -- The two commands for everybody ---------------------------------------------------------------

.PHONY: demo
demo:  ## from a bare Debian: build, then store, check and serve a family of real models
	@scripts/setup.sh demo
	@"$(VENV)/bin/pydedup" demo $(ARGS)

.PHONY: test
test:  ## from a bare Debian: install what tests need, then run all but the long ones
	@scripts/test.sh $(ARGS)

# -- For those who work on it ---------------------------------------------------------------------

.PHONY: setup
setup:  ## the environment with pydedup and all that tests need, nothing run
	@scripts/setup.sh test

.PHONY: lint
lint:  ## style, types, hygiene
	@scripts/setup.sh test
	@scripts/lint.sh

.PHONY: format
format:  ## let ruff and clang-format rewrite the sources
	@scripts/setup.sh
	@scripts/lint.sh --fix

.PHONY: tidy
tidy:  ## clang-tidy over the core (a compile of its own)
	@scripts/setup.sh
	@scripts/native.sh tidy

.PHONY: native
native:  ## the C++ core alone, and its tests
	@scripts/setup.sh
	@scripts/native.sh dev

.PHONY: cross
cross:  ## the native tests on emulated CPUs: 64-bit Arm, and x86-64 without AVX
	@scripts/setup.sh
	@scripts/cross.sh

.PHONY: sanitize
sanitize:  ## the native tests under ASan + UBSan and under TSan
	@scripts/setup.sh
	@scripts/native.sh $(SANITIZERS)

.PHONY: crash
crash:  ## kill clients of each database, 200 times per kind of work; the store must verify
	@scripts/setup.sh test
	@PYDEDUP_REQUIRE_BACKENDS=sqlite,postgres,mysql PYDEDUP_CRASH_ROUNDS=$(CRASH_ROUNDS) "$(VENV)/bin/pytest" --timeout=7200 -o faulthandler_timeout=7200 tests/crash tests/scoring/test_killed_score.py tests/ray/test_killed.py tests/ray/test_killed_server.py $(ARGS)

.PHONY: soak
soak:  ## load on a real server for SECONDS (1800): fails at an error or when its memory grows
	@scripts/setup.sh test
	@"$(VENV)/bin/python" bench/peers/http_load.py --soak --seconds $(SECONDS) $(ARGS)

.PHONY: test-long
test-long:  ## the tests that `make test` leaves out: many seconds of a core for each
	@scripts/setup.sh test
	@PYDEDUP_REQUIRE_BACKENDS=sqlite,postgres,mysql "$(VENV)/bin/pytest" -m long $(ARGS)

.PHONY: test-plpython
test-plpython:  ## the functions inside of PostgreSQL, with pydedup built for the Python of Debian
	@scripts/setup.sh test
	@scripts/plpython.sh $(ARGS)

.PHONY: test-postgres
test-postgres:  ## the tests of PostgreSQL with servers of the versions 13 to 17
	@scripts/setup.sh test
	@scripts/postgres-versions.sh $(ARGS)

.PHONY: test-mysql
test-mysql:  ## the tests of MySQL with servers of the versions 8.0, 8.4 and the newest
	@scripts/setup.sh test
	@scripts/mysql-versions.sh $(ARGS)

.PHONY: test-bare
test-bare:  ## `make demo` and `make test` on a bare Debian or Ubuntu of SUITE (trixie, noble, ...)
	@scripts/bare.sh $(SUITE) $(ARGS)

.PHONY: test-oldest
test-oldest:  ## the tests with the oldest releases of all packages that pyproject.toml names
	@scripts/setup.sh test
	@scripts/oldest.sh $(ARGS)

.PHONY: test-clusters
test-clusters:  ## MariaDB Galera (two nodes) and Spider (two servers), for real
	@scripts/setup.sh test
	@scripts/clusters.sh $(ARGS)

.PHONY: fuzz
fuzz:  ## libFuzzer on everything that reads stored bytes, FUZZ_SECONDS (600) for each target (clang)
	@scripts/setup.sh
	@scripts/fuzz.sh $(ARGS)

.PHONY: bench
bench:  ## the benchmarks of bench/ (an idle machine gives better numbers)
	@scripts/setup.sh bench
	@scripts/bench.sh $(ARGS)

.PHONY: bench-gate
bench-gate:  ## instruction counts of the kernels against bench/callgrind/baseline.json (valgrind)
	@scripts/setup.sh
	@scripts/bench-gate.sh $(ARGS)

.PHONY: bench-gate-update
bench-gate-update:  ## make the counts of this compiler the baseline
	@scripts/setup.sh
	@scripts/bench-gate.sh --update $(ARGS)

.PHONY: wheel
wheel:  ## manylinux wheels for each Python found here, each tried in an empty environment
	@scripts/setup.sh
	@scripts/wheel.sh

.PHONY: clean
clean:  ## remove what was built (the environment and downloads stay)
	rm -rf build dist wheelhouse .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean  ## and the virtual environment
	@test ! -e "$(VENV)/pyvenv.cfg" || rm -rf "$(VENV)"
