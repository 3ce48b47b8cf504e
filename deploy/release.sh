#!/usr/bin/env bash
# Makes what a release consists of. The same inputs, with the same tools on the machine, give the same bytes.
#
# Usage: deploy/release.sh tarball TARGET [--binaries FOLDER] [--out FOLDER]    one tarball, with its SBOM
#        deploy/release.sh finish [--base-url URL] [--out FOLDER]               install.sh, and SHA256SUMS of everything
#        deploy/release.sh images [--push REGISTRY] [--out FOLDER]              images of the tarballs' binaries
#
# TARGET is one of Rust's, such as x86_64-unknown-linux-musl: built here with cargo, which needs that target and a C
# compiler for it (Debian's musl-tools). --binaries takes finished programs instead. --out is target/release-VERSION.
#
# The SBOM needs cargo-cyclonedx; without it, or with REPOFLEET_NO_SBOM=1, there is none. Completions and man pages are
# added if the programs run here and write them.
#
# images: for this machine with --out's one tarball of its architecture, named repofleet/PROGRAM:VERSION. With --push, for
# all architectures with SBOM and provenance (needs buildx and a login), named REGISTRY/PROGRAM:VERSION; prints a line for
# each: name, and digest. RUNTIME_IMAGE names another base image, as from a mirror.
set -euo pipefail
cd "$(dirname "$0")/.."

programs=(producer worker)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)

fail() { printf 'deploy/release.sh: %s\n' "$*" >&2; exit 1; }
usage() { sed -n '4,6s/^# //p' "$0" >&2; exit 2; }

[ $# -gt 0 ] || usage
command=$1 target='' binaries='' base_url='' registry='' out=target/release-$version
shift
if [ "$command" = tarball ]; then
    [ $# -gt 0 ] || usage
    target=$1
    shift
fi
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || usage
    case "$command $1" in
    'tarball --binaries') binaries=$2 ;;
    'finish --base-url') base_url=$2 ;;
    'images --push') registry=$2 ;;
    *' --out') out=$2 ;;
    *) usage ;;
    esac
    shift 2
done
mkdir -p "$out"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The time in the tarball: that of the commit.
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH=$epoch

build() {
    # Paths of this machine would make each machine's binaries others.
    local flags="--remap-path-prefix=$PWD=/src --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
    local cargo=(cargo)
    # Writes the list of crates into each binary, for scanners.
    ! cargo auditable --version >/dev/null 2>&1 || cargo=(cargo auditable)
    REPOFLEET_COMMIT=$(git rev-parse HEAD) RUSTFLAGS="${RUSTFLAGS:-} $flags" "${cargo[@]}" build --profile dist --locked \
        --target "$target" --package producer --package worker --bins
    binaries=${CARGO_TARGET_DIR:-target}/$target/dist
    local program
    for program in "${programs[@]}"; do
        case "$target" in
        *-musl)
            ! readelf --program-headers "$binaries/$program" | grep -q INTERP ||
                fail "$binaries/$program is not static: it asks for an interpreter"
            ;;
        esac
    done
}

# What the programs write themselves, where they run here and have the command.
written_by_programs() {
    local program shell file
    for program in "${programs[@]}"; do
        for shell in bash zsh fish; do
            case "$shell" in
            bash) file=bash-completion/completions/$program ;;
            zsh) file=zsh/site-functions/_$program ;;
            fish) file=fish/vendor_completions.d/$program.fish ;;
            esac
            "$1/bin/$program" completions "$shell" >"$work/completions" 2>/dev/null || continue
            mkdir -p "$1/share/${file%/*}"
            cp "$work/completions" "$1/share/$file"
        done
    done
    mkdir "$work/man"
    for program in "${programs[@]}"; do
        "$1/bin/$program" man "$work/man" >/dev/null 2>&1 || true
    done
    if [ -n "$(ls "$work/man")" ]; then
        mkdir -p "$1/share/man/man1"
        cp "$work"/man/* "$1/share/man/man1"
    fi
    [ -e "$1/share" ] || echo "no completions and man pages: the programs do not write them, or do not run here"
}

sbom() {
    if [ -n "${REPOFLEET_NO_SBOM:-}" ] || ! cargo cyclonedx --version >/dev/null 2>&1; then
        echo "no SBOM: cargo-cyclonedx is not there, or REPOFLEET_NO_SBOM is set"
        return
    fi
    # One for each crate; the producer's has the worker and all that both use.
    cargo cyclonedx --quiet --format json --target "$target" --override-filename sbom
    mv producer/sbom.json "$out/$1.cdx.json"
    git ls-files '*/Cargo.toml' | sed 's|Cargo.toml$|sbom.json|' | xargs rm -f
}

tarball() {
    local name=repofleet-$version-$target program
    [ -n "$binaries" ] || build
    mkdir -p "$work/$name/bin"
    for program in "${programs[@]}"; do
        [ -f "$binaries/$program" ] || fail "there is no $binaries/$program"
        cp "$binaries/$program" "$work/$name/bin"
        # A release build is stripped already, and another architecture's is not for this machine's strip.
        strip "$work/$name/bin/$program" 2>/dev/null || echo "$program is taken as it is: strip does not know its format"
    done
    cp README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT "$work/$name"
    written_by_programs "$work/$name"
    tar --create --directory "$work" --sort=name --mtime="@$epoch" --owner=0 --group=0 --numeric-owner \
        --mode='u=rwX,go=rX' --format=gnu "$name" | gzip --no-name --best >"$out/$name.tar.gz"
    sbom "$name"
    du -h "$out/$name.tar.gz"
}

finish() {
    local files
    sed "s|^base_url=.*|base_url=\${REPOFLEET_BASE_URL:-$base_url}|; s|^version=.*|version=\${REPOFLEET_VERSION:-$version}|" \
        deploy/install.sh >"$out/install.sh"
    chmod 755 "$out/install.sh"
    cd "$out"
    files=(repofleet-"$version"-*)
    [ -e "${files[0]}" ] || fail "there is no tarball in $out"
    sha256sum "${files[@]}" install.sh | tee SHA256SUMS
}

# Unpacks the tarball for Docker's architecture $1 as the context of release/Dockerfile.
context() {
    local rust
    case "$1" in
    amd64) rust=x86_64 ;;
    arm64) rust=aarch64 ;;
    *) fail "no tarball is made for $1" ;;
    esac
    local tarball=("$out/repofleet-$version-$rust"-*.tar.gz)
    [ -e "${tarball[0]}" ] || return 1
    [ ${#tarball[@]} = 1 ] || fail "which of ${tarball[*]}?"
    mkdir -p "$work/$1"
    tar --extract --gzip --file "${tarball[0]}" --directory "$work/$1" --strip-components 1
}

images() {
    local program image machine
    # Folders with these modes: see deploy/Dockerfile.
    install --directory --mode 1777 "$work/empty/scratch" "$work/empty/data"
    local build=(--file deploy/release/Dockerfile --build-arg VERSION="$version"
        --build-arg REVISION="$(git rev-parse HEAD)" ${RUNTIME_IMAGE:+--build-arg RUNTIME_IMAGE="$RUNTIME_IMAGE"})
    if [ -z "$registry" ]; then
        machine=$(docker version --format '{{.Server.Arch}}')
        context "$machine" || fail "there is no tarball for $machine in $out"
        for program in "${programs[@]}"; do
            docker build --quiet "${build[@]}" --build-arg TARGETARCH="$machine" --target "$program" \
                --tag "repofleet/$program:$version" "$work"
        done
        return
    fi
    { context amd64 && context arm64; } || fail "there are not both tarballs in $out"
    for program in "${programs[@]}"; do
        image=$registry/$program
        docker buildx build "${build[@]}" --platform linux/amd64,linux/arm64 --target "$program" \
            --provenance mode=max --sbom true --metadata-file "$work/metadata" --tag "$image:$version" --push "$work"
        echo "$image $(sed -n 's/.*"containerimage.digest": "\(sha256:[0-9a-f]*\)".*/\1/p' "$work/metadata" | head -n 1)"
    done
}

case "$command" in
tarball | finish | images) "$command" ;;
*) usage ;;
esac
