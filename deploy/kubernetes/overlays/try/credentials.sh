#!/usr/bin/env bash
# Creates random passwords for broker and store of the overlay `try`, outside of version control. Existing ones are kept,
# since the broker's volume remembers them.
set -euo pipefail
cd "$(dirname "$0")"
umask 077

random() { od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }

if [ ! -e broker.secret ]; then
    password=$(random 16)
    cat >broker.secret <<EOF
username=repofleet
password=$password
connection_string=amqp://repofleet:$password@repofleet-broker:5672/
EOF
fi
if [ ! -e store.secret ]; then
    cat >store.secret <<EOF
AWS_ACCESS_KEY_ID=$(random 10)
AWS_SECRET_ACCESS_KEY=$(random 20)
EOF
fi
