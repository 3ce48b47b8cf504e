#!/usr/bin/env bash
# Checks the configuration, the alerts (each fires in alerts_test.yml) and every expression of the dashboard.
#
# Usage: deploy/prometheus/check.sh                          needs promtool and python3, no server
#        deploy/prometheus/check.sh http://localhost:9090    needs python3; evaluates each expression of the dashboard
#                                                            in that Prometheus: none may return nothing
set -euo pipefail
cd "$(dirname "$0")"

promtool=${PROMTOOL:-promtool}
if [ $# = 0 ] && ! command -v "$promtool" >/dev/null; then
    cat >&2 <<'MESSAGE'
deploy/prometheus/check.sh: promtool is missing. It is part of Prometheus: install Debian's package
promtool (13 and later) or prometheus (12; to have the program alone, `apt-get download prometheus`
and `dpkg -x prometheus_*.deb FOLDER`), and name it in PROMTOOL where it is not in PATH. With Docker:
docker run --rm -v "$PWD/deploy:/deploy" -w /deploy/prometheus --entrypoint promtool prom/prometheus test rules alerts_test.yml
MESSAGE
    exit 1
fi

if [ $# = 0 ]; then
    "$promtool" check config prometheus.yml
    "$promtool" check rules alerts.yml
    "$promtool" test rules alerts_test.yml
fi

# Replaces the variables that Grafana fills in.
expressions=$(mktemp --suffix=.yml)
trap 'rm -f "$expressions"' EXIT
python3 - ../grafana/dashboard.json "$expressions" alerts.yml alerts_test.yml "$@" <<'PYTHON'
import json, re, sys, urllib.parse, urllib.request

dashboard, rules, alerts, tests, *server = sys.argv[1:]
VARIABLES = {"$__rate_interval": "2m", "$__interval": "1m", "$__range": "1h"}

found = []

def look(panel):
    for target in panel.get("targets", []):
        expr = target["expr"]
        for name, value in VARIABLES.items():
            expr = expr.replace(name, value)
        if "$" in expr:
            sys.exit(f"{dashboard}: {panel['title']}: unknown variable: {expr}")
        found.append((panel["title"], expr))
    for inner in panel.get("panels", []):
        look(inner)

for panel in json.load(open(dashboard))["panels"]:
    look(panel)
if not found:
    sys.exit(f"{dashboard} has no expressions")
with open(rules, "w") as file:
    rule = lambda n, expr: {"record": f"dashboard:{n}", "expr": expr}
    group = {"name": "dashboard", "rules": [rule(n, expr) for n, (_, expr) in enumerate(found)]}
    json.dump({"groups": [group]}, file)
print(f"{dashboard}: {len(found)} expressions")

if server:
    empty = []
    for title, expr in found:
        query = urllib.parse.urlencode({"query": expr})
        try:
            with urllib.request.urlopen(f"{server[0]}/api/v1/query?{query}", timeout=30) as answer:
                if not json.load(answer)["data"]["result"]:
                    empty.append(f"{title}: {expr}")
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"{server[0]} does not answer like a Prometheus: {error}\nGive its address, such as http://localhost:9090")
    if empty:
        sys.exit("nothing returned by\n" + "\n".join(empty))
    print(f"{server[0]}: each of them returns something")
    sys.exit()

# Each alert has a test in which it fires.
fired = set(re.findall(r'alertname="(\w+)"', open(tests).read()))
named = set(re.findall(r"alert: (\w+)", open(alerts).read()))
if named != fired:
    sys.exit(f"{tests} does not test: {sorted(named ^ fired)}")
PYTHON
[ $# != 0 ] || "$promtool" check rules "$expressions"
