#!/usr/bin/env bash
# Gives a user of RabbitMQ what a role of repofleet needs, and nothing else: run it where rabbitmqctl is.
#
# Usage: deploy/rights/rabbitmq.sh ROLE USER [PREFIX [VHOST]]
#   ROLE    producer, worker or observer (`producer observe`, `producer status`)
#   USER    exists already: rabbitmqctl add_user USER
#   PREFIX  the programs' --queue-prefix (repofleet)
#   VHOST   best one for repofleet alone: retries go through the default exchange, by which a worker
#           can write to every queue of its vhost (/)
#
# RABBITMQCTL names another program than rabbitmqctl, such as "docker compose exec -T rabbitmq rabbitmqctl".
set -euo pipefail

fail() { printf 'deploy/rights/rabbitmq.sh: %s\n' "$*" >&2; exit 2; }

bound='^$'
role=${1:-} user=${2:-} prefix=${3:-repofleet} vhost=${4:-/}
[ -n "$user" ] || fail "usage: deploy/rights/rabbitmq.sh producer|worker|observer USER [PREFIX [VHOST]]"
[[ "$prefix" =~ ^[A-Za-z0-9._-]+$ ]] || fail "the prefix $prefix has other characters than letters, digits, . _ -"
name=${prefix//./\\.}
# Every queue and exchange of this prefix; the queues for notices, which the broker names.
all="$name(\\.(jobs|retry\\.[0-9]+s|dead|ledger|hosts|producer))?"
own='amq\.gen-.*'

# configure (declare, delete), write (publish, bind to), read (consume, bind from); routing keys written, and bound.
case $role in
    producer) rights=("^($all|$own)\$" "^($all|$own|amq\\.default)\$" "^($all|$own)\$") keys='.*' bound='.*' ;;
    worker)
        rights=("^$own\$" "^($name(\\.(dead|hosts))?|$own|amq\\.default)\$" "^($name\\.(jobs|hosts)|$own)\$")
        keys='^(outcome|run)$'
        ;;
    # It writes marks to find the ledger's end by.
    observer) rights=('^$' "^$name\$" "^$name\\.ledger\$") keys='^run$' ;;
    *) fail "there is no role $role: producer, worker or observer" ;;
esac

read -ra control <<<"${RABBITMQCTL:-rabbitmqctl}"
"${control[@]}" set_permissions -p "$vhost" "$user" "${rights[@]}"
"${control[@]}" set_topic_permissions -p "$vhost" "$user" "$prefix" "$keys" "$bound"
