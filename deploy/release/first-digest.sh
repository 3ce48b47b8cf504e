#!/usr/bin/env bash
# From nothing to the first digest: in an empty root file system with busybox and a release, without a compiler, a
# network or any library. Fails if that takes more than a minute, or if a slot cannot ask a DNS server.
#
# Usage: deploy/release/first-digest.sh [FOLDER]    FOLDER is that of deploy/release.sh, after `finish`
#
# Needs root (for chroot and namespaces), python3, and Debian's busybox-static, which it unpacks without installing it.
set -euo pipefail
cd "$(dirname "$0")/../.."

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
release=$(realpath "${1:-target/release-$version}")
most=60

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{bin,dev,etc,tmp,proc,root,release,repository}
echo 'nameserver 127.0.0.1' >"$root/etc/resolv.conf"
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
# Each libc has its own way to ask, and slots are confined.
said=$(SSL_CERT_FILE=/certificates worker digest https://nobody.example/a/b --allow-host nobody.example 2>&1 || true)
echo "$said" | grep -F 'cannot resolve nobody.example: no such name' || { echo "$said" >&2; exit 1; }
END
cp /etc/ssl/certs/ca-certificates.crt "$root/certificates"
# A DNS server that knows no name.
cat >"$root/dns.py" <<'END'
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
print("ready", flush=True)
while True:
    asked, asker = server.recvfrom(512)
    server.sendto(asked[:2] + b"\x81\x83" + asked[4:], asker)
END
# The mounts are gone with the namespace.
# shellcheck disable=SC2016 # the inner shell expands $1
unshare --mount --pid --fork --net sh -euc '
    mount -t proc proc "$1/proc"
    ip link set lo up 2>/dev/null || ifconfig lo up
    mkfifo "$1/ready"; python3 "$1/dns.py" >"$1/ready" & read -r _ <"$1/ready"
    for device in null urandom; do mount --bind "/dev/$device" "$1/dev/$device"; done
    chroot "$1" /bin/busybox sh /first' sh "$root"
seconds=$(cat "$root/seconds")
echo "installed, and two digests made, in $seconds s"
[ "$seconds" -le "$most" ] || { echo "that is more than $most s" >&2; exit 1; }
