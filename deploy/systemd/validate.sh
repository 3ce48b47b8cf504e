#!/usr/bin/env bash
# Holds the units to systemd's own checks, where systemd is, and to deploy/kubernetes/check.py.
#
# Usage: deploy/systemd/validate.sh [PYTHON]    a Python that has PyYAML
set -euo pipefail
cd "$(dirname "$0")"
python=${1:-python3}
# What `systemd-analyze security` may say at most, of 100: 20 is "OK", 40 "medium".
exposure=20

printf '\n-- systemd\n'
"$python" ../kubernetes/check.py --units ./*.service ./*.timer
"$python" ../kubernetes/check.py --environment environment.example
echo "units and environment.example: variables, options, times, as they should be"

if ! command -v systemd-analyze >/dev/null; then
    echo "systemd-analyze: SKIPPED, this machine has no systemd"
    exit 0
fi
# With a program in place of ours, which need not be installed here, and an instance of the template.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for unit in *.service *.timer; do
    sed 's|^ExecStart=/usr/local/bin/[a-z]*|ExecStart=/bin/true|' "$unit" >"$work/${unit/@./@1.}"
done
# Only what is said of our own units: those of the machine are not ours to mend.
said=$(systemd-analyze verify --recursive-errors=no "$work"/* 2>&1) ||
    { printf '%s\n' "$said"; exit 1; }
if grep -F repofleet <<<"$said"; then exit 1; fi
echo "systemd-analyze verify: nothing to say"
for unit in "$work"/*.service; do
    overall=$(systemd-analyze security --offline=yes --threshold="$exposure" --no-pager "$unit" | tail -n 1) ||
        { systemd-analyze security --offline=yes --no-pager "$unit"; exit 1; }
    printf '%s: %s\n' "${unit##*/}" "${overall#* }"
done
