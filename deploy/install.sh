#!/bin/sh
# Installs producer and worker from a release: downloads the tarball for this machine, checks it, unpacks it.
#
# Usage: install.sh [--prefix FOLDER]      into FOLDER/bin, share/man … (default: ~/.local)
#
#   REPOFLEET_BASE_URL    where the release's files are: an https address, or a folder. A release's own copy of this
#                         script knows it
#   REPOFLEET_VERSION     which version
#
# Needs curl or wget, tar, and sha256sum or shasum. Nothing is installed unless the tarball has the checksum that the
# release's SHA256SUMS says.
set -eu

# Written by deploy/release.sh in a release.
base_url=${REPOFLEET_BASE_URL:-}
version=${REPOFLEET_VERSION:-}

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

usage() {
    printf 'usage: install.sh [--prefix FOLDER]\n' >&2
    exit "$1"
}

prefix=${HOME:-}/.local
while [ $# -gt 0 ]; do
    case $1 in
    --prefix)
        [ $# -gt 1 ] || usage 2
        prefix=$2
        shift
        ;;
    --prefix=*) prefix=${1#--prefix=} ;;
    -h | --help) usage 0 ;;
    *) usage 2 ;;
    esac
    shift
done
[ -n "$base_url" ] || fail "where is the release? Set REPOFLEET_BASE_URL to the address or folder of its files"
[ -n "$version" ] || fail "which version? Set REPOFLEET_VERSION, as in REPOFLEET_VERSION=0.1.0"
base_url=${base_url%/}

build_it="build it with Rust instead: cargo build --release"
[ "$(uname -s)" = Linux ] || fail "there are binaries for Linux only, not for $(uname -s); $build_it"
case $(uname -m) in
x86_64 | amd64) target=x86_64-unknown-linux-musl ;;
aarch64 | arm64) target=aarch64-unknown-linux-musl ;;
*) fail "there are no binaries for $(uname -m), only for x86_64 and aarch64; $build_it" ;;
esac

# fetch NAME: the release's file NAME, into $work.
fetch() {
    case $base_url in
    https://* | http://127.0.0.1[:/]* | http://localhost[:/]*)
        if command -v curl >/dev/null 2>&1; then
            curl --fail --silent --show-error --location --retry 3 --output "$work/$1" "$base_url/$1"
        elif command -v wget >/dev/null 2>&1; then
            wget --quiet --tries=3 --output-document="$work/$1" "$base_url/$1"
        else
            fail "neither curl nor wget is there: install one of them"
        fi
        ;;
    *://*) fail "$base_url is not an https address" ;;
    *) cp "$base_url/$1" "$work/$1" ;;
    esac || fail "cannot get $base_url/$1: is there a version $version, and does this machine reach it?"
}

if command -v sha256sum >/dev/null 2>&1; then
    checksum() { sha256sum "$1"; }
elif command -v shasum >/dev/null 2>&1; then
    checksum() { shasum --algorithm 256 "$1"; }
else
    fail "neither sha256sum nor shasum is there, so that nothing could be checked: install one of them"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

name=repofleet-$version-$target
fetch SHA256SUMS
expected=$(sed -n "s/^\([0-9a-f]\{64\}\) [ *]$name\.tar\.gz\$/\1/p" "$work/SHA256SUMS")
[ -n "$expected" ] || fail "$base_url/SHA256SUMS does not name $name.tar.gz; nothing was installed"
fetch "$name.tar.gz"
found=$(checksum "$work/$name.tar.gz" | cut -d ' ' -f 1)
[ "$found" = "$expected" ] ||
    fail "$name.tar.gz has the checksum $found, and should have $expected: a broken or changed download; nothing was installed"

mkdir "$work/unpacked"
gzip -d -c "$work/$name.tar.gz" | tar -x -f - -C "$work/unpacked"
unpacked=$work/unpacked/$name
for program in producer worker; do
    says=$("$unpacked/bin/$program" -V 2>&1) || fail "$program does not run on this machine: $says; $build_it"
done

mkdir -p "$prefix/bin" || fail "cannot write to $prefix: give another folder with --prefix"
for program in producer worker; do
    # Beside the old one and then renamed: the old one may be running.
    cp "$unpacked/bin/$program" "$prefix/bin/.$program.new" ||
        fail "cannot write to $prefix/bin: give another folder with --prefix"
    chmod 755 "$prefix/bin/.$program.new"
    mv -f "$prefix/bin/.$program.new" "$prefix/bin/$program"
done
# Completions and man pages.
if [ -d "$unpacked/share" ]; then
    cp -R "$unpacked/share" "$prefix"
fi

printf 'installed %s and worker into %s\n' "$("$prefix/bin/producer" -V)" "$prefix/bin"
case :$PATH: in
*:"$prefix/bin":*) ;;
*) printf 'not in PATH yet: export PATH="%s:%s"\n' "$prefix/bin" "\$PATH" ;;
esac
