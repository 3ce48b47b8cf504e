#!/usr/bin/env bash
# Runs compose.yaml: forty workers and a git server, runs without faults, and one in which ten workers and the broker are
# killed. Checks the bucket after each run, and that Prometheus and Grafana show the fleet; prints figures.
# Removes everything at the end, volumes included. Another fleet (another project name) is not touched.
#
# Usage: deploy/compose-test.sh         exit codes: 0 passed, 1 failed, 69 no Docker engine
#
# Variables: WORKERS (40), COUNT of repositories (200), KILLED workers (10); KEEP=1 leaves everything running,
# NO_BUILD=1 uses the images of the last build, NO_GRAFANA=1 leaves Grafana out.
# RUST_IMAGE, RUNTIME_IMAGE, DEBIAN_IMAGE, RABBITMQ_IMAGE, S3_IMAGE, PROMETHEUS_IMAGE name other images, as from a mirror.
# Needs python3, to query Prometheus.
set -euo pipefail
cd "$(dirname "$0")/.."

workers=${WORKERS:-40} killed=${KILLED:-10}
export COUNT=${COUNT:-200}
# Longest time for a run, in seconds.
patience=900

fail() { printf 'deploy/compose-test.sh: %s\n' "$*" >&2; exit 1; }
no_engine() { printf 'deploy/compose-test.sh: %s\n' "$*" >&2; exit 69; }
step() { printf '\n== %s (after %s s)\n' "$*" "$SECONDS"; }
figure() { printf 'figure: %s\n' "$*"; }

command -v docker >/dev/null || no_engine "there is no docker command: see https://docs.docker.com/engine/install/"
docker info >/dev/null 2>&1 ||
    no_engine "no Docker engine answers: is it started, and may you use it? See: docker info"
docker compose version >/dev/null 2>&1 ||
    no_engine "docker has no compose: see https://docs.docker.com/compose/install/linux/"

command -v python3 >/dev/null || fail "python3 is missing; it queries Prometheus"

project=repofleet-test
compose() {
    docker compose --project-name "$project" --env-file /dev/null \
        --file compose.yaml --file deploy/compose-test.yaml --progress quiet "$@"
}
# Runs a command of the producer, and prints only its output.
producer() { compose run --rm --no-deps --no-TTY producer "$@" 2>/dev/null; }
containers() { docker ps --quiet --filter "label=com.docker.compose.project=$project" "$@"; }
workers_alive() { containers --filter label=com.docker.compose.service=worker; }

# Also containers of `compose run`, which `down` does not know; they would keep the network.
take_away() {
    containers --all | xargs --no-run-if-empty docker rm --force --volumes >/dev/null || true
    compose --profile observe down --volumes --remove-orphans --timeout 5 || true
}

clean() {
    local code=$?
    trap - EXIT
    if [ "$code" != 0 ]; then
        compose ps --all || true
        compose logs --tail 5 2>/dev/null | tail -n 100 || true
    fi
    if [ -z "${KEEP:-}" ]; then
        step "cleaning up"
        take_away
    fi
    exit "$code"
}

# Starts a run in the background, and prints its container.
start_run() { compose run --detach --no-deps --no-TTY producer run 2>/dev/null | tail -n 1; }

# Waits for the run in container $1, and prints its sentence.
end_of() {
    local code
    code=$(timeout "$patience" docker wait "$1") || fail "the run has not ended after $patience s"
    docker logs "$1" >"$logs/$1" 2>&1
    [ "$code" = 0 ] || { tail -n 20 "$logs/$1" >&2; fail "the run ended with code $code"; }
    last_sentence "$logs/$1"
}

last_sentence() { sed -n 's/.*"message":"\(Pipeline complete: [^"]*\)".*/\1/p' "$1" | tail -n 1; }

# Checks that sentence $1 begins with the numbers $2.
expect() { [ "${1#"Pipeline complete: $2, "}" != "$1" ] || fail "$1, and not $2"; }

in_s3() { printf '%s\n' "$@" | compose exec --no-TTY s3 weed shell -master=localhost:9333 2>/dev/null; }

# Checks that the bucket holds a digest of each repository's last push, and that nothing is left over.
check() {
    local year=$1 log=$logs/check-$1 said
    # Reads the pushedAt of every object, whatever the index says.
    producer run --check head >"$log" || fail "the checking run ended with code $?"
    said=$(last_sentence "$log")
    expect "$said" "$COUNT total, $COUNT cached (100.0%), 0 processed, 0 failed"
    echo "a run after it: $said"
    local digests
    digests=$(in_s3 "fs.tree /buckets/repofleet/gitingest" | grep -c 'summary\.txt') || true
    [ "$digests" = "$COUNT" ] || fail "$digests digests in the bucket, and not $COUNT"
    echo "in the bucket: $digests digests"
    if [ "$year" != 2023 ]; then
        local names commands name with
        names=$(compose exec --no-TTY git ls /srv/git/crates)
        commands=()
        for name in $names; do
            commands+=("fs.cat /buckets/repofleet/gitingest/crates/${name%.git}/summary.txt")
        done
        with=$(in_s3 "${commands[@]}" | grep -c -- "── PUSHED-$year.txt") || true
        [ "$with" = "$COUNT" ] || fail "$with digests show the push of $year, and not $COUNT"
        echo "in their texts: all $with show the push of $year"
    fi
    local dead status
    dead=$(producer dead list --json | grep -c '^{') || true
    [ "$dead" = 0 ] || fail "$dead dead letters"
    status=$(producer status --json)
    for member in '"open":0' '"failed":0' '"waiting":0' '"waiting_retry":0' '"dead_letters":0'; do
        [[ "${status// /}" == *"$member"* ]] || fail "the status lacks $member: $status"
    done
    echo "dead letters: 0; nothing waits"
}

# Waits until $1 workers report that they can work.
wait_until_ready() {
    local wanted=$1 end=$((SECONDS + 180)) ready container
    while :; do
        ready=0
        for container in $(workers_alive); do
            docker exec "$container" /usr/local/bin/worker health --ready 2>/dev/null && ready=$((ready + 1))
        done
        [ "$ready" -lt "$wanted" ] || return 0
        [ "$SECONDS" -lt "$end" ] || fail "$ready workers are ready, and not $wanted"
        sleep 1
    done
}

# The address of port $2 of Prometheus (Grafana …) from here.
address() { printf 'http://%s' "$(compose --profile observe port "$1" "$2")"; }

# Prints the body at the address $1.
get() {
    python3 -c 'import sys, urllib.request as r; sys.stdout.buffer.write(r.urlopen(sys.argv[1]).read())' "$1" 2>/dev/null
}

# Prometheus' answer to the query $1: a number, or nothing.
prometheus_says() {
    get "$(address prometheus 9090)/api/v1/query?query=$(python3 -c \
        'import sys, urllib.parse as p; print(p.quote(sys.argv[1]))' "$1")" |
        python3 -c 'import json, sys; [print(r["value"][1]) for r in json.load(sys.stdin)["data"]["result"]]' 2>/dev/null
}

# Waits until the command succeeds; fails with its output after 180 s.
wait_for() {
    local what=$1 end=$((SECONDS + 180))
    shift
    until "$@" >"$logs/waiting" 2>&1; do
        [ "$SECONDS" -lt "$end" ] || { cat "$logs/waiting" >&2; fail "$what: not after 180 s"; }
        sleep 2
    done
}

sees_all_workers() { [ "$(prometheus_says 'count(up{job="worker"} == 1)')" = "$workers" ]; }
grafana_has_dashboard() { [[ "$(get "$(address grafana 3000)/api/dashboards/uid/repofleet")" == *'"title":"repofleet"'* ]]; }

logs=$(mktemp -d)
trap clean EXIT
take_away >/dev/null 2>&1

if [ -z "${NO_BUILD:-}" ]; then
    step "building"
    start=$SECONDS
    compose build || fail "cannot build the images; if a registry is out of reach, name other images (see the head of this file)"
    figure "images built in $((SECONDS - start)) s"
fi
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
for program in producer worker; do
    layers=$(docker history --human=false --no-trunc --format '{{.Size}} {{.CreatedBy}}' "repofleet/$program:$version")
    above=$(awk '/COPY/ && /scratch|data|LICENSE|release|bin/ {s += $1} END {printf "%.1f", s / 1e6}' <<<"$layers")
    figure "image repofleet/$program:$version: $above MB above its base"
    # A program alone has more than 10 MB; less means that the history's format has changed.
    awk -v above="$above" 'BEGIN {exit !(above > 10 && above < 60)}' || fail "an image is more than 60 MB above its base"
done

step "docker compose up --scale worker=$workers"
start=$SECONDS
compose up --detach --scale worker="$workers" || fail "it does not come up"
figure "up after $((SECONDS - start)) s, broker and store healthy"
said=$(end_of "$(compose ps --all --quiet producer)")
figure "first run: $said"
figure "from nothing to the end of the first run: $((SECONDS - start)) s"
expect "$said" "$COUNT total, 0 cached (0.0%), $COUNT processed, 0 failed"
wait_until_ready "$workers"
figure "$workers workers are ready"
memory=$(workers_alive | xargs docker stats --no-stream --format '{{.MemUsage}}' |
    awk '{n = $1 + 0; if ($1 ~ /GiB/) n *= 1024; s += n; if (n > m) m = n} END {printf "%.0f MiB in all, %.0f MiB at most", s, m}')
figure "memory of the workers, at rest: $memory"
check 2023

step "docker compose --profile observe up"
start=$SECONDS
observers=(observe prometheus)
[ -n "${NO_GRAFANA:-}" ] || observers+=(grafana)
compose --profile observe up --detach --no-deps --no-recreate "${observers[@]}" || fail "they do not come up"
wait_for "Prometheus finds $workers workers by their name" sees_all_workers
figure "Prometheus sees $workers workers, after $((SECONDS - start)) s"
if [ -n "${NO_GRAFANA:-}" ]; then
    echo "Grafana: left out"
else
    wait_for "Grafana has the dashboard" grafana_has_dashboard
    echo "Grafana has the dashboard"
fi

step "everything is pushed again"
compose exec --no-TTY git repositories push 2024
said=$(end_of "$(start_run)")
figure "second run: $said"
expect "$said" "$COUNT total, 0 cached (0.0%), $COUNT processed, 0 failed"
check 2024
# A rate needs two scrapes, 15 s apart.
wait_for "each expression of the dashboard returns something" deploy/prometheus/check.sh "$(address prometheus 9090)"
figure "$(head -n 1 "$logs/waiting"), for each of which Prometheus has something"
firing=$(prometheus_says 'count(ALERTS{alertstate="firing"})')
figure "alerts that fire: ${firing:-0}"

step "and again, and in the middle $killed workers and the broker are killed"
compose exec --no-TTY git repositories push 2025
run=$(start_run)
end=$((SECONDS + patience))
until docker logs "$run" 2>&1 | grep -qE '"message":"Processed [1-9][0-9]*/'; do
    [ "$SECONDS" -lt "$end" ] || fail "nothing is processed after $patience s"
    [ "$(docker inspect --format '{{.State.Running}}' "$run")" = true ] || fail "the run ended before anything was killed"
    sleep 0.2
done
docker logs "$run" 2>&1 | sed -n 's/.*"message":"\(Processed [^"]*\)".*/when they are killed: \1/p' | tail -n 1
workers_alive | shuf -n "$killed" | xargs docker kill --signal KILL >/dev/null
compose kill --signal KILL rabbitmq
[ "$(docker inspect --format '{{.State.Running}}' "$run")" = true ] || fail "the run was over before the broker was killed"
start=$SECONDS
compose start rabbitmq
alive=$(workers_alive | wc -l)
[ "$alive" = $((workers - killed)) ] || fail "$alive workers are left, and not $((workers - killed))"
echo "$alive workers are left; the broker is started again"
said=$(end_of "$run")
figure "third run, with $killed workers and the broker killed: $said"
figure "it ended $((SECONDS - start)) s after the broker was killed"
expect "$said" "$COUNT total, 0 cached (0.0%), $COUNT processed, 0 failed"
check 2025

step "what was killed comes back, and everybody stops when asked to"
compose up --detach --no-recreate --no-deps --scale worker="$workers" worker
wait_until_ready "$workers"
start=$SECONDS
stopped=$(workers_alive)
compose stop worker
figure "$workers workers stopped in $((SECONDS - start)) s"
# shellcheck disable=SC2086
codes=$(docker inspect --format '{{.State.ExitCode}}' $stopped | sort | uniq -c)
[ "$(tr -d ' ' <<<"$codes")" = "${workers}0" ] || fail "workers ended with other codes than 0: $codes"

printf '\npassed: the runs close and the bucket is right, with and without kills\n'
