#!/usr/bin/env bash
# Checks the units with deploy/kubernetes/check.py and, if systemd is installed, with systemd-analyze.
#
# Usage: deploy/systemd/validate.sh [PYTHON]    a Python with PyYAML
set -euo pipefail
cd "$(dirname "$0")"
python=${1:-python3}
# Highest accepted score of `systemd-analyze security`, of 100: 20 is "OK", 40 "medium".
exposure=20

printf '\n-- systemd\n'
"$python" ../kubernetes/check.py --units ./*.service ./*.timer
"$python" ../kubernetes/check.py --environment environment.example
echo "units and environment.example: variables, options, times, exit codes: fine"

if ! command -v systemd-analyze >/dev/null; then
    echo "systemd-analyze: SKIPPED, this machine has no systemd"
    exit 0
fi
# Another program stands in for ours, which need not be installed; the template gets an instance.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for unit in *.service *.timer; do
    sed 's|^ExecStart=/usr/local/bin/[a-z]*|ExecStart=/bin/true|' "$unit" >"$work/${unit/@./@1.}"
done
# Only messages about our units: the machine's own are not ours to fix.
said=$(systemd-analyze verify --recursive-errors=no "$work"/* 2>&1) ||
    { printf '%s\n' "$said"; exit 1; }
if grep -F repofleet <<<"$said"; then exit 1; fi
echo "systemd-analyze verify: fine"
for unit in "$work"/*.service; do
    overall=$(systemd-analyze security --offline=yes --threshold="$exposure" --no-pager "$unit" | tail -n 1) ||
        { systemd-analyze security --offline=yes --no-pager "$unit"; exit 1; }
    printf '%s: %s\n' "${unit##*/}" "${overall#* }"
done
