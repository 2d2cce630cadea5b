#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bare.sh SUITE [TARGET...]: the README's commands on a bare Debian or Ubuntu (trixie, forky, noble, ...).
#
# debootstrap makes that system in build/bare/SUITE, with git, make and its own Python alone; the commit
# that is checked out here is cloned into it, and each TARGET of the Makefile (demo and test) is run there
# as root. It takes root and the right to mount. Processes and mounts end with the script, the folder
# stays, and is used again; `make clean` removes it.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

SUITE=${1:-}
[ -n "$SUITE" ] || die "name a suite of Debian or Ubuntu, e.g. scripts/bare.sh trixie"
shift
[ $# -gt 0 ] || set -- demo test
may_mount || die "a bare system takes root and the right to mount (the capability SYS_ADMIN)"
BARE=$ROOT/build/bare/$SUITE
HOME_THERE=/root

needed=()
have curl || needed+=(curl)
PATH=$PATH:/usr/sbin have debootstrap || needed+=(debootstrap ubuntu-archive-keyring)
apt_install "${needed[@]}"
if [ ! -e "$BARE/.made" ]; then
    rm -rf --one-file-system "$BARE"
    mkdir -p "$BARE"
    origin=(http://deb.debian.org/debian)
    if ! curl -fsI "${origin[0]}/dists/$SUITE/Release" >"$LOGS/bare-release.log"; then
        # One script of debootstrap is for all of Ubuntu's releases, those that it does not know too.
        origin=(http://archive.ubuntu.com/ubuntu /usr/share/debootstrap/scripts/gutsy)
    fi
    of_ubuntu=()
    [ "${#origin[@]}" -eq 1 ] || of_ubuntu=(--components=main,universe --keyring=/usr/share/keyrings/ubuntu-archive-keyring.gpg)
    step "a bare $SUITE" bare-system env "PATH=$PATH:/usr/sbin:/sbin" debootstrap --variant=minbase \
        --include=python3,git,make,ca-certificates "${of_ubuntu[@]}" "$SUITE" "$BARE" "${origin[@]}"
    touch "$BARE/.made"
fi
# The network is ours, and so are those who vouch for it.
cp -L /etc/resolv.conf /etc/hosts "$BARE/etc/"
cp -L /etc/ssl/certs/ca-certificates.crt "$BARE/etc/ssl/certs/"
rm -rf "$BARE$HOME_THERE/pydedup.git"
git clone -q --bare "$ROOT" "$BARE$HOME_THERE/pydedup.git"
COMMIT=$(git -C "$ROOT" rev-parse HEAD)

# In a PID namespace, so that no server outlives this; /dev and /proc are mounted for it alone.
for target in "$@"; do
    started=$SECONDS status=0
    say "" "make $target on $SUITE, commit ${COMMIT:0:8}"
    unshare --mount --pid --fork --kill-child bash -c '
        mount --rbind /dev "$0/dev" && mount -t proc proc "$0/proc" && exec chroot "$0" "${@:1}"' "$BARE" \
        env -i HOME=$HOME_THERE LANG=C.UTF-8 TERM="${TERM:-dumb}" \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
        REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt PIP_DEFAULT_TIMEOUT="${PIP_DEFAULT_TIMEOUT:-60}" \
        bash -euc '
            cd
            [ -e pydedup ] || git clone -q pydedup.git pydedup
            cd pydedup
            git fetch -q ../pydedup.git "$1"
            git checkout -q --detach FETCH_HEAD
            exec make "$2"' bash "$COMMIT" "$target" || status=$?
    say "make $target on $SUITE: exit $status after $((SECONDS - started)) s"
    [ "$status" -eq 0 ] || exit "$status"
done
