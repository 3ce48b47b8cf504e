#!/usr/bin/env bash
# Runs the units under a real systemd, in a container: a producer alone, started by hand and by its timer; then a fleet of
# four workers, one of which is killed and one stopped with jobs in hand. Removes everything at the end.
#
# Usage: deploy/systemd/try.sh [DIR]    DIR (target/release) holds producer and worker, built for Debian trixie or older
# Exit codes: 0 passed, 1 failed, 69 no Docker engine, or none that lets systemd run.
#
# Variables: KEEP=1 leaves everything running; DEBIAN_IMAGE, RABBITMQ_IMAGE, S3_IMAGE name other images, as from a mirror.
set -euo pipefail
bin=$(realpath -m "${1:-$(dirname "$0")/../../target/release}")
cd "$(dirname "$0")/.."

name=repofleet-try
fail() { printf 'deploy/systemd/try.sh: %s\n' "$*" >&2; exit 1; }
no_engine() { printf 'deploy/systemd/try.sh: %s\n' "$*" >&2; exit 69; }
step() { printf '\n== %s (after %s s)\n' "$*" "$SECONDS"; }
inside() { docker exec --interactive "$name-systemd" "$@"; }
start() { docker run --detach --network "$name" --network-alias "$1" --name "$name-$1" "${@:2}" >/dev/null; }

command -v docker >/dev/null || no_engine "there is no docker command: see https://docs.docker.com/engine/install/"
docker info >/dev/null 2>&1 ||
    no_engine "no Docker engine answers: is it started, and may you use it? See: docker info"
for program in producer worker; do
    [ -x "$bin/$program" ] || fail "there is no $bin/$program: cargo build --release"
done

# What systemd needs; less than --privileged, which not every engine grants.
rights=(--cgroupns private --cap-add ALL --cap-drop SYS_RESOURCE --security-opt seccomp=unconfined
    --security-opt apparmor=unconfined --security-opt systempaths=unconfined)
# Its own part of cgroup2, even if the engine mounts version 1; never the root, which is the machine's.
boot='mount -o remount,rw /sys; umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
    test -e /sys/fs/cgroup/cgroup.type; exec /sbin/init'
remove() {
    docker rm --force --volumes "$name"-{systemd,git,s3,rabbitmq} || true
    docker network rm "$name" || true; docker rmi "$name" || true
} >/dev/null 2>&1
clean() {
    local code=$?
    trap - EXIT
    [ "$code" = 0 ] || inside journalctl --no-pager --lines 40 --output cat 2>/dev/null || true
    [ -n "${KEEP:-}" ] || remove
    exit "$code"
}
trap clean EXIT; remove

step "building"
docker build --quiet --tag "$name" --file - compose-test <<EOF
FROM ${DEBIAN_IMAGE:-debian:trixie-slim}
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends systemd-sysv dbus procps git lighttpd >/dev/null \
    && systemctl mask systemd-sysctl systemd-modules-load console-getty lighttpd && install -d /srv/git /srv/www
COPY repositories /usr/local/bin/
COPY lighttpd.conf /etc/lighttpd/
RUN sed -i 's/= 256$/= 64/' /etc/lighttpd/lighttpd.conf && install -d /crates && cp -r /usr/share/perl/*.*.*/*/ /crates && repositories make /crates 100
EOF
docker network create "$name" >/dev/null
start rabbitmq --env RABBITMQ_DEFAULT_USER=repofleet --env RABBITMQ_DEFAULT_PASS=repofleet \
    "${RABBITMQ_IMAGE:-rabbitmq:4.3.2-management}"
start s3 --env AWS_ACCESS_KEY_ID=repofleet --env AWS_SECRET_ACCESS_KEY=repofleet-to-try --env S3_BUCKET=repofleet \
    "${S3_IMAGE:-chrislusf/seaweedfs:4.48}" mini -dir=/data -ip.bind=0.0.0.0
start git --init "$name" lighttpd -D -f /etc/lighttpd/lighttpd.conf
start systemd "${rights[@]}" --env container=docker --tmpfs /run --tmpfs /run/lock --tmpfs /tmp \
    --volume "$bin:/built:ro" --volume "$PWD/systemd:/units:ro" "$name" sh -euc "$boot"
sleep 3
state=$(inside systemctl is-system-running --wait || true)
[[ "$state" =~ ^(running|degraded)$ ]] ||
    no_engine "systemd does not run in a container of this engine ($state): KEEP=1, then docker logs $name-systemd"
inside systemctl --version | head -n 1
count=$(docker exec "$name-git" sh -c 'ls /srv/git/crates | tr A-Z a-z | sort -u | wc -l')

# Waits until command $2... succeeds, at most $1 seconds.
await() { local end=$((SECONDS + $1)); until "${@:2}"; do [ "$SECONDS" -lt "$end" ] || fail "in vain: ${*:2}"; sleep 0.5; done; }
property() { inside systemctl show --property "$2" --value "$1"; }
said() { inside journalctl -u repofleet-producer -t producer -o cat -n 1 | sed 's/.*"message":"\([^"]*\)".*/\1/'; }
# Checks that the last run's sentence begins with the numbers $1.
expect() { local last; last=$(said); echo "$last"; [ "${last#"Pipeline complete: $1, "}" != "$last" ] || fail "not $1"; }
idle() { [[ "$(property repofleet-producer ActiveState)" =~ ^(inactive|failed)$ ]]; }
closed() { idle && [[ "$(said)" == *"$1"* ]]; }
busy() { inside sh -c "pgrep -P $(property "$1" MainPID) -f slot" >/dev/null; }
environment() { inside tee /etc/repofleet/environment >/dev/null; }
feed=$'FEED=http://git:8080/repos.json\nALLOW_HTTP_FEED=1\nALLOW_HTTP=1\nALLOW_HOST=git:8080'

step "a producer by itself"
inside sh -euc 'install -m 755 /built/producer /built/worker /usr/local/bin/
    install -m 644 /units/repofleet-* /etc/systemd/system/
    install -D -m 600 /units/environment.example /etc/repofleet/environment; systemctl daemon-reload'
environment <<<"$feed"
inside systemctl start repofleet-producer || fail "it ended with $(property repofleet-producer ExecMainStatus)"
expect "$count total, 0 cached (0.0%), $count processed, 0 failed"
[ "$(inside find /var/lib/private/repofleet-producer/digests -name summary.txt | wc -l)" = "$count" ] || fail "digests are missing"
inside systemctl edit --runtime --stdin repofleet-producer.timer <<<$'[Timer]\nOnCalendar=\nOnCalendar=*:*:0/5\nRandomizedDelaySec=0\nAccuracySec=1s'
inside systemctl start repofleet-producer.timer
await 60 closed "$count total, $count cached"
inside systemctl stop repofleet-producer.timer
await 60 idle
echo "and by its timer: $(said)"

step "a fleet"
# The timer above started the producer more often than its StartLimitBurst= allows in a night.
inside systemctl reset-failed repofleet-producer
environment <<<"$feed"$'\nBROKER_URL=amqp://repofleet:repofleet@rabbitmq:5672\nSTORE_URL=s3://repofleet\nAWS_ENDPOINT_URL=http://s3:8333\nAWS_ACCESS_KEY_ID=repofleet\nAWS_SECRET_ACCESS_KEY=repofleet-to-try'
await 90 docker exec "$name-rabbitmq" rabbitmq-diagnostics --quiet check_port_connectivity >/dev/null 2>&1
inside sh -c 'echo CONCURRENCY=2 >/etc/repofleet/worker.environment'
inside systemctl enable --quiet --now repofleet-worker@{1..4}
[ "$(inside ps -C worker -o uid= | sort -u | wc -l)" = 4 ] || fail "workers share a user"
inside systemctl start --no-block repofleet-producer
await 60 busy repofleet-worker@1
inside sh -c "kill -9 $(property repofleet-worker@1 MainPID)"
inside bash -c 'set -a; . /etc/repofleet/environment; producer run >/dev/null 2>&1; [ $? = 75 ]' || fail "a second producer does not end with 75"
await 60 busy repofleet-worker@2
inside systemctl stop repofleet-worker@2
[ "$(property repofleet-worker@2 Result)" = success ] || fail "a worker that is stopped: $(property repofleet-worker@2 Result)"
await 300 idle
expect "$count total, 0 cached (0.0%), $count processed, 0 failed"
again() { [ "$(property repofleet-worker@1 NRestarts) $(property repofleet-worker@1 ActiveState)" = "1 active" ]; }
await 30 again

step "everybody stops"
inside systemctl stop repofleet-worker@{1..4}
for i in 1 2 3 4; do [ "$(property "repofleet-worker@$i" Result)" = success ] || fail "worker $i: $(property "repofleet-worker@$i" Result)"; done
[ -z "$(inside find /var/cache/private/repofleet-worker -mindepth 2)" ] || fail "their scratch folders are not empty"
printf '\npassed\n'
