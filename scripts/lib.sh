# SPDX-License-Identifier: Apache-2.0
# Shared by the scripts of this folder: messages, steps with a log and visible progress, system
# packages. Sourced, never run; nothing here knows what pydedup is.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
case $VENV in /*) ;; *) VENV=$ROOT/$VENV ;; esac
LOGS=$ROOT/build/logs
STAMPS=$VENV/.stamps
JOBS=${JOBS:-$(nproc 2>/dev/null || echo 2)}
cd "$ROOT"
mkdir -p "$LOGS"

export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$JOBS}
export CTEST_PARALLEL_LEVEL=${CTEST_PARALLEL_LEVEL:-$JOBS}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off
# The tools that were installed into the environment (cmake, ninja, ruff) go before the system's.
export PATH="$VENV/bin:$PATH"

# What a wheel and the native tests have in common is compiled once, where ccache is there: it wants
# the compiler by one name, which pip and CMake would choose by themselves, and differently.
if [ -z "${CXX:-}" ] && command -v g++ >/dev/null; then export CXX=g++; fi
with_ccache() {
    ! command -v ccache >/dev/null || export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
}
with_ccache

say() { printf '%s\n' "$@"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# step TITLE LOG COMMAND...: run with its output in build/logs/LOG.log. Someone who watches sees
# the seconds and the last line of the log (on a terminal twice a second, elsewhere every 15 s); the end of
# the log is shown when the command fails.
step() {
    local title=$1 log=$LOGS/$2.log started=$SECONDS status=0 shown=$SECONDS pid line columns
    shift 2
    # In a process group of its own (set -m), so that Ctrl-C ends all of it, but in this session,
    # so that sudo still knows the terminal.
    set -m
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    set +m
    trap 'kill -TERM -- "-$pid" 2>/dev/null; printf "\ninterrupted: %s\n" "$title" >&2; exit 130' INT TERM
    [ -t 1 ] || printf -- '--> %s\n' "$title"
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.5
        if [ -t 1 ]; then
            line="--> $title ($((SECONDS - started)) s) $(last_line "$log")"
            # \r goes back to the start of a line of the terminal: of a longer one, the rest would stay.
            { columns=$(stty size <&3 | cut -d' ' -f2); } 3>&1
            printf '\r\033[K%s' "${line:0:columns - 1}"
        elif [ $((SECONDS - shown)) -ge 15 ]; then
            shown=$SECONDS
            printf '    %d s: %s\n' $((SECONDS - started)) "$(last_line "$log")"
        fi
    done
    wait "$pid" || status=$?
    trap - INT TERM
    [ -t 1 ] && printf '\r\033[K'
    if [ "$status" -eq 0 ]; then
        printf ' ok %s (%d s)\n' "$title" $((SECONDS - started))
    else
        printf 'FAILED %s (exit %d after %d s); the end of %s:\n' \
            "$title" "$status" $((SECONDS - started)) "${log#"$ROOT"/}"
        tail -n 60 "$log" | sed 's/^/    /'
    fi
    return "$status"
}

# The last line that says something, cut.
last_line() { tail -c 2000 "$1" 2>/dev/null | tr '\r' '\n' | grep -v '^[[:space:]]*$' | tail -n 1 | tr -d '\033' | cut -c1-60; }

# fresh NAME KEY: whether the work NAME was last done with this key.  done_with NAME KEY: it now is.
fresh() { [ "$(cat "$STAMPS/$1" 2>/dev/null)" = "$2" ]; }
done_with() { mkdir -p "$STAMPS" && printf '%s\n' "$2" >"$STAMPS/$1"; }

# One digest over the names and contents of files and folders.
digest_of() {
    find "$@" -type f -not -path '*/__pycache__/*' -not -name '*.so' -print0 | LC_ALL=C sort -z |
        xargs -0 sha256sum | sha256sum | cut -d' ' -f1
}

# may_mount: whether we are root and have the capability SYS_ADMIN, which containers withhold.
may_mount() { [ "$(id -u)" -eq 0 ] && [ $((16#$(awk '/^CapEff:/ { print $2 }' /proc/self/status) >> 21 & 1)) -eq 1 ]; }

# chromium_is_snap: whether Chromium comes as a snap here, which wants a running snapd: on Ubuntu.
chromium_is_snap() { grep -qs '^ID=ubuntu' /etc/os-release; }

# plpython_version: the PostgreSQL that this Debian has PL/Python for, nothing where that is not known.
plpython_version() {
    case $(. /etc/os-release 2>/dev/null; echo "${ID:-} ${VERSION_ID:-}") in
        "debian 12") echo 15 ;;
        "debian 13") echo 17 ;;
    esac
}
# plpython_is_of MINOR: whether PL/Python here is of that Python, e.g. 3.13.
plpython_is_of() { [ -n "$(plpython_version)" ] && [ "$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; }
# Of that server only the programs are wanted: its package is told to make no cluster, and start none.
no_cluster() {
    [ "$(id -u)" -eq 0 ] && [ ! -e /etc/postgresql-common/createcluster.conf ] || return 0
    mkdir -p /etc/postgresql-common
    echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
}
has_plpython() { [ -e "/usr/lib/postgresql/$(plpython_version)/lib/plpython3.so" ]; }

# apt_install PACKAGE...: what is missing of Debian's packages, as root or through sudo.
apt_install() {
    [ $# -gt 0 ] || return 0
    local as_root=() wanted="apt-get install $*"
    have apt-get || die "these are needed and this is no Debian, so install their like by hand: $*"
    if [ "$(id -u)" -ne 0 ]; then
        have sudo || die "root or sudo is needed once, to run: $wanted"
        if ! sudo -n true 2>/dev/null; then
            [ -t 0 ] || die "sudo asks for a password and nobody is there to type it; run once: sudo $wanted"
            say "sudo is needed for: $wanted"
            sudo -v || die "sudo refused; as root, run once: $wanted"
        fi
        as_root=(sudo -n)
    fi
    apt_run() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -y -q -o Dpkg::Use-Pty=0 "$@"; }
    # A machine may hold package lists that are too old, or none at all: they are fetched when the
    # names are not in them. (apt-get alone cannot be asked: it takes the + of an unknown g++ for a
    # pattern, installs what matches, and is content.)
    if compgen -G "/var/lib/apt/lists/*Packages*" >/dev/null &&
        apt_run --dry-run --no-install-recommends install "$@" >/dev/null 2>&1 &&
        step "system packages: $*" apt apt_run --no-install-recommends install "$@"; then
        return 0
    fi
    step "package lists" apt-update apt_run update || die "apt-get update failed"
    step "system packages: $*" apt apt_run --no-install-recommends install "$@" ||
        die "apt-get could not install: $*"
}
