#!/usr/bin/env bash
# Writes the PrometheusRule of the component `monitoring`: the rules of deploy/prometheus/alerts.yml,
# which kustomize cannot reach from there, word for word.
#
# Usage: deploy/kubernetes/prometheus-rule.sh            writes it
#        deploy/kubernetes/prometheus-rule.sh --check    fails where it is not up to date
set -euo pipefail
cd "$(dirname "$0")"
alerts=../prometheus/alerts.yml
component=components/monitoring

fail() { printf 'deploy/kubernetes/prometheus-rule.sh: %s\n' "$*" >&2; exit 1; }

rule() {
    cat <<EOF
# Written by prometheus-rule.sh from deploy/prometheus/alerts.yml: change that one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: repofleet
spec:
EOF
    sed 's/^\(.\)/  \1/' "$alerts"
}

[ -e "$alerts" ] || fail "there is no deploy/prometheus/alerts.yml to write it from"
case "${1:-}" in
--check)
    stale="$component is not up to date: run deploy/kubernetes/prometheus-rule.sh"
    rule | cmp -s - "$component/prometheusrule.yaml" || fail "$stale"
    grep -qxF '  - prometheusrule.yaml' "$component/kustomization.yaml" || fail "$stale"
    ;;
'')
    rule >"$component/prometheusrule.yaml"
    grep -qxF '  - prometheusrule.yaml' "$component/kustomization.yaml" ||
        sed -i 's/^  - podmonitor.yaml$/&\n  - prometheusrule.yaml/' "$component/kustomization.yaml"
    ;;
*) fail "what is $1?" ;;
esac
