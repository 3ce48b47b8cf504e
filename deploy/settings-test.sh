#!/usr/bin/env bash
# Uncomments every line of .env.example and reads it the three ways that it is for: by a shell, by `docker compose` and by
# systemd. Each must see the value as it is written.
#
# Usage: deploy/settings-test.sh    Exit codes: 0 passed, 1 failed. What is not installed is left out, and said.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Of a variable with two lines the later one counts, wherever it is read.
sed -n 's/^#\([A-Z][A-Z0-9_]*=\)/\1/p' .env.example >"$work/settings.env"
grep -q '^ONLY=.*,' "$work/settings.env" || { echo "deploy/settings-test.sh: .env.example has no list" >&2; exit 1; }

compare() { # WAY [empty-as-unset]: what it read, on standard input
    python3 - "$work/settings.env" "$@" 3<&0 <<'EOF'
import os, sys
path, way, *empty_as_unset = sys.argv[1:]
def lines(file):
    return dict(line.rstrip("\n").split("=", 1) for line in file if "=" in line)
want, have = lines(open(path)), lines(os.fdopen(3))
if empty_as_unset:
    want = {name: value for name, value in want.items() if value}
wrong = [f"{name}={value} is read as {have.get(name)!r}" for name, value in want.items() if have.get(name) != value]
print(f".env.example read by {way}: " + ("; ".join(wrong) if wrong else f"{len(want)} variables, each as it is written"))
sys.exit(bool(wrong))
EOF
}

# shellcheck disable=SC2016 # $1 is the inner shell's.
by_shell() { env -i PATH="$PATH" sh -c 'set -a; . "$1"; set +a; env' sh "$1"; }

by_shell "$work/settings.env" | compare "a shell"

if docker compose version >/dev/null 2>&1; then
    echo 'services: {any: {image: any, env_file: [settings.env]}}' >"$work/compose.yaml"
    docker compose --file "$work/compose.yaml" --env-file "$work/settings.env" config --format json |
        python3 -c 'import json, sys
for pair in json.load(sys.stdin)["services"]["any"]["environment"].items(): print("=".join(pair))' |
        compare "docker compose"
else
    echo ".env.example read by docker compose: SKIPPED, not installed"
fi

# systemd's reader of EnvironmentFile= without systemd running: the same one reads environment.d, which takes no empty
# values. It quotes what it prints for a shell.
reader=/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator
if [ -x "$reader" ]; then
    mkdir -p "$work/environment.d"
    grep -v '=$' "$work/settings.env" >"$work/environment.d/settings.conf"
    env -i HOME="$work" XDG_CONFIG_HOME="$work" "$reader" >"$work/read.env"
    by_shell "$work/read.env" | compare systemd empty-as-unset
else
    echo ".env.example read by systemd: SKIPPED, not installed"
fi
