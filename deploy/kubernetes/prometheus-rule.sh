#!/usr/bin/env bash
# Copies deploy/prometheus/alerts.yml, which kustomize cannot reach, into the PrometheusRule of the component `monitoring`.
#
# Usage: deploy/kubernetes/prometheus-rule.sh            writes it
#        deploy/kubernetes/prometheus-rule.sh --check    fails if it is not up to date
set -euo pipefail
cd "$(dirname "$0")"
alerts=../prometheus/alerts.yml
component=components/monitoring

fail() { printf 'deploy/kubernetes/prometheus-rule.sh: %s\n' "$*" >&2; exit 1; }

rule() {
    cat <<EOF
# Written by prometheus-rule.sh from deploy/prometheus/alerts.yml; edit that file.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: repofleet
spec:
EOF
    sed 's/^\(.\)/  \1/' "$alerts"
}

[ -e "$alerts" ] || fail "deploy/prometheus/alerts.yml is missing"
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
*) fail "unknown argument $1" ;;
esac
