#!/usr/bin/env bash
# From nothing to the first digest: in an empty root file system with busybox and a release, without a compiler, a
# network or any library. Fails if that takes more than a minute.
#
# Usage: deploy/release/first-digest.sh [FOLDER]    FOLDER is that of deploy/release.sh, after `finish`
#
# Needs root (for chroot and namespaces) and Debian's busybox-static, which it unpacks without installing it.
set -euo pipefail
cd "$(dirname "$0")/../.."

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
release=$(realpath "${1:-target/release-$version}")
most=60

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{bin,dev,tmp,proc,root,release,repository}
touch "$root"/dev/{null,urandom}

if ! busybox=$(command -v busybox) || readelf --program-headers "$busybox" | grep -q INTERP; then
    chmod 755 "$root"
    (cd "$root/tmp" && apt-get download -qq busybox-static 2>/dev/null && dpkg -x busybox-static_*.deb .)
    busybox=$root/tmp/bin/busybox
fi
cp "$busybox" "$root/bin/busybox"
find "$root/tmp" -mindepth 1 -delete
cp "$release"/* "$root/release"
git clone --quiet --bare --depth 1 "file://$PWD" "$root/repository/repofleet.git"
cat >"$root/repository/repos.json" <<'END'
[{"owner": "repofleet", "name": "repofleet", "url": "repofleet.git", "pushedAt": "2026-01-01T00:00:00Z"}]
END

cat >"$root/first" <<'END'
set -eu
export PATH=/bin:/root/.local/bin HOME=/root
/bin/busybox --install -s /bin
begun=$(date +%s)
REPOFLEET_BASE_URL=/release sh /release/install.sh
worker digest /repository/repofleet.git | head -n 4
echo "first digest after $(($(date +%s) - begun)) s"
producer check --feed /repository/repos.json --store /tmp/digests || true
producer run --feed /repository/repos.json --store /tmp/digests
test -s /tmp/digests/gitingest/repofleet/repofleet/summary.txt
echo $(($(date +%s) - begun)) >/seconds
END
# The mounts are gone with the namespace.
# shellcheck disable=SC2016 # the inner shell expands $1
unshare --mount --pid --fork --net sh -euc '
    mount -t proc proc "$1/proc"
    for device in null urandom; do mount --bind "/dev/$device" "$1/dev/$device"; done
    exec chroot "$1" /bin/busybox sh /first' sh "$root"
seconds=$(cat "$root/seconds")
echo "installed, and two digests made, in $seconds s"
[ "$seconds" -le "$most" ] || { echo "that is more than $most s" >&2; exit 1; }
