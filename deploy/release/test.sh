#!/usr/bin/env bash
# Makes a release of finished programs with release.sh, and installs it with install.sh, or not: wrong checksum, missing
# file, another architecture. Nothing leaves this machine.
#
# Usage: deploy/release/test.sh FOLDER    with the programs producer and worker, such as target/debug
set -euo pipefail
cd "$(dirname "$0")/../.."
binaries=$1

fail() { printf 'deploy/release/test.sh: %s\n' "$*" >&2; exit 1; }

work=$(mktemp -d)
server=''
trap '[ -z "$server" ] || kill "$server"; rm -rf "$work"' EXIT
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
case $(uname -m) in
aarch64) target=aarch64-unknown-linux-musl ;;
*) target=x86_64-unknown-linux-musl ;;
esac
tarball=repofleet-$version-$target.tar.gz
export REPOFLEET_NO_SBOM=1

for out in one two; do
    # Neither mode, time nor folder of the programs may show in the tarball.
    mkdir "$work/in-$out"
    cp "$binaries"/{producer,worker} "$work/in-$out"
    [ "$out" = one ] || chmod 700 "$work/in-$out"/*
    deploy/release.sh tarball "$target" --binaries "$work/in-$out" --out "$work/$out" >"$work/made"
    deploy/release.sh finish --out "$work/$out" >>"$work/made"
done
cmp "$work/one/$tarball" "$work/two/$tarball" || fail "two tarballs of the same programs differ"
tar --list --gzip --file "$work/one/$tarball" >"$work/list"
for file in bin/producer bin/worker README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT; do
    grep -qx "${tarball%.tar.gz}/$file" "$work/list" || fail "the tarball lacks $file"
done
echo "tarball: $(wc -l <"$work/list") files, the same bytes twice"

# Runs a release's own install.sh with the base URL $1 into the folder $2.
install_from() { REPOFLEET_BASE_URL=$1 "$work/one/install.sh" --prefix "$work/$2" >"$work/said" 2>&1; }

# Expects that it refuses, says $3, and installs nothing.
refuses() {
    ! install_from "$1" "$2" || fail "it installs from $2"
    grep -q "$3" "$work/said" || { cat "$work/said" >&2; fail "it does not say: $3"; }
    [ ! -e "$work/$2" ] || fail "something was installed from $2"
    echo "refused, $2: $(sed "s|$work|…|g" "$work/said" | tail -n 1)"
}

install_from "$work/one" from-folder || { cat "$work/said" >&2; fail "it does not install from a folder"; }
"$work/from-folder/bin/producer" --version | grep -qx "producer $version.*" || fail "the installed producer does not run"
"$work/from-folder/bin/worker" --version >/dev/null || fail "the installed worker does not run"
echo "installed from a folder: $(head -n 1 "$work/said" | sed "s|$work|…|")"

python3 -u - "$work/one" >"$work/address" <<'PYTHON' &
import functools, http.server, sys
quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=sys.argv[1]))
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
PYTHON
server=$!
for _ in {1..100}; do
    [ ! -s "$work/address" ] || break
    sleep 0.1
done
address=$(cat "$work/address")
install_from "$address" over-http || { cat "$work/said" >&2; fail "it does not install over http from $address"; }
# Again, over what is there, while it runs.
install_from "$address/" over-http || fail "it does not install over an older version"
echo "installed over http, twice"

refuses "$address/nowhere" missing-release "cannot get"
refuses http://example.org "plain-http" "not an https address"
mkdir "$work/broken" "$work/unnamed" "$work/gone" "$work/fake"
cp "$work/one/SHA256SUMS" "$work/broken"
# One byte more.
{ cat "$work/one/$tarball"; echo; } >"$work/broken/$tarball"
refuses "$work/broken" wrong-checksum "should have"
cp "$work/one/$tarball" "$work/unnamed"
echo "$(printf '%064d' 0)  other.tar.gz" >"$work/unnamed/SHA256SUMS"
refuses "$work/unnamed" without-checksum "does not name"
cp "$work/one/SHA256SUMS" "$work/gone"
refuses "$work/gone" missing-tarball "cannot get"
cat >"$work/fake/uname" <<'EOF'
#!/bin/sh
case $1 in -s) echo Linux ;; *) echo riscv64 ;; esac
EOF
chmod +x "$work/fake/uname"
PATH=$work/fake:$PATH refuses "$work/one" other-architecture "no binaries for riscv64"
printf '#!/bin/sh\necho Darwin\n' >"$work/fake/uname"
PATH=$work/fake:$PATH refuses "$work/one" other-system "for Linux only"
