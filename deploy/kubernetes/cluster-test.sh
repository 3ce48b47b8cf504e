#!/usr/bin/env bash
# Runs the overlay `try` in the cluster that KUBECONFIG names, in a namespace of its own: applies it, runs the feed, starts
# a rival producer, kills a worker and the broker, scales and rolls out while a run is open, and removes everything.
#
# Usage: deploy/kubernetes/cluster-test.sh    exit codes: 0 passed, 1 failed, 69 no cluster
#
# Variables: COUNT of repositories (40, the feed's first), WORKERS to scale to (10), NAMESPACE (repofleet-test; must not
# exist), PRODUCER_IMAGE and WORKER_IMAGE (repofleet/…, which the nodes must have: `kind load docker-image`), FEED;
# KEEP=1 leaves everything as it is at the end.
# The nodes need the internet: feed and repositories are real ones. WORKERS=10 requests 5 GiB of memory and 2.5 CPUs.
set -euo pipefail
cd "$(dirname "$0")"

count=${COUNT:-40} workers=${WORKERS:-10} namespace=${NAMESPACE:-repofleet-test}
# Longest time for a run, and for pods to start, in seconds.
patience=1800 start_up=300

say() { printf 'deploy/kubernetes/cluster-test.sh: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
no_cluster() { say "$*"; exit 69; }
step() { printf '\n== %s (after %s s)\n' "$*" "$SECONDS"; }
figure() { printf 'figure: %s\n' "$*"; }

command -v kubectl >/dev/null || no_cluster "there is no kubectl: see https://kubernetes.io/docs/tasks/tools/"
kubectl version --request-timeout=15s >/dev/null 2>&1 ||
    no_cluster "no cluster answers: KUBECONFIG names none that does; \`kind create cluster\` makes one. See: kubectl cluster-info"
# Somebody else's fleet is not touched.
kubectl get namespace "$namespace" >/dev/null 2>&1 &&
    fail "the namespace $namespace exists: set NAMESPACE to another name, or \`kubectl delete namespace $namespace\`"

# In the namespace.
k() { kubectl --namespace "$namespace" "$@"; }
producer() { k exec deployment/repofleet-observe -- /usr/local/bin/producer "$@"; }

work=$(mktemp -d)
clean() {
    local code=$?
    trap - EXIT
    if [ "$code" != 0 ]; then
        k get pods,jobs --output wide || true
        k get events --sort-by=.lastTimestamp 2>/dev/null | tail -n 20 || true
    fi
    [ -n "${KEEP:-}" ] || kubectl delete namespace "$namespace" --ignore-not-found --timeout=300s || true
    rm -rf "$work"
    exit "$code"
}
trap clean EXIT

# A copy, which gets passwords and an overlay with the namespace and the images of this test.
cp -R base components overlays "$work"
rm -f "$work"/overlays/*/*.secret
"$work/overlays/try/credentials.sh"
overlay=$work/overlays/test
mkdir "$overlay"
{
    cat <<EOF
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: $namespace
resources: [../try]
patches:
  - target: {kind: Namespace}
    patch: '[{"op": "replace", "path": "/metadata/name", "value": "$namespace"}]'
configMapGenerator:
  - name: repofleet-producer
    behavior: merge
    literals:
      - LIMIT=$count
EOF
    [ -z "${FEED:-}" ] || echo "      - FEED=$FEED"
} >"$overlay/kustomization.yaml"
kubectl kustomize "$overlay" >"$work/built"
# `images` of kustomize would need name and tag apart.
for program in producer worker; do
    variable=${program^^}_IMAGE
    [ -z "${!variable:-}" ] || sed -i "s|image: repofleet/$program:.*|image: ${!variable}|" "$work/built"
done

# Creates the Job $1, with the variables that follow set in its container.
start_job() {
    local name=$1
    shift
    k create job --from=cronjob/repofleet-producer "$name" --dry-run=client --output yaml >"$work/job"
    [ $# = 0 ] || {
        kubectl set env --local --filename "$work/job" --output yaml "$@" >"$work/job-with-env"
        mv "$work/job-with-env" "$work/job"
    }
    k create --filename "$work/job"
}

is_over() { [ -n "$(k get job "$1" --output jsonpath='{.status.conditions[?(@.status=="True")].type}')" ]; }
open() { ! is_over "$1" || fail "the run was over before $2; set COUNT to more than $count"; }

# Waits for a line of the log of Job $1 that matches $2.
wait_for_line() {
    local end=$((SECONDS + patience))
    until k logs "job/$1" 2>/dev/null | grep -qE "$2"; do
        is_over "$1" && { k logs "job/$1" --tail 20 >&2; fail "job/$1 ended without the line $2"; }
        [ "$SECONDS" -lt "$end" ] || fail "job/$1 has no line $2 after $patience s"
        sleep 1
    done
}

# Waits for the end of Job $1, and leaves the four numbers of its last sentence in total, cached, processed, failed.
end_of() {
    local end=$((SECONDS + patience)) said
    until is_over "$1"; do
        [ "$SECONDS" -lt "$end" ] || fail "job/$1 has not ended after $patience s"
        sleep 1
    done
    k logs "job/$1" >"$work/log"
    said=$(sed -n 's/.*"message":"\(Pipeline complete: [^"]*\)".*/\1/p' "$work/log" | tail -n 1)
    figure "job/$1: $said"
    k wait --for=condition=Complete --timeout=1s "job/$1" >/dev/null || {
        tail -n 20 "$work/log" >&2
        fail "job/$1 failed"
    }
    [[ "$said" =~ ^Pipeline\ complete:\ ([0-9,]+)\ total,\ ([0-9,]+)\ cached\ .*,\ ([0-9,]+)\ processed,\ ([0-9,]+)\ failed ]] ||
        fail "job/$1 does not end with its numbers: $said"
    total=${BASH_REMATCH[1]//,/} cached=${BASH_REMATCH[2]//,/} processed=${BASH_REMATCH[3]//,/} failed=${BASH_REMATCH[4]//,/}
    [ "$total" = "$count" ] || fail "the run counts $total repositories, and not $count"
    [ $((cached + processed + failed)) = "$total" ] || fail "$cached cached + $processed processed + $failed failed is not $total"
}

scale() {
    k scale deployment/repofleet-worker --replicas="$1"
    [ "${2:-}" = "" ] || k rollout status deployment/repofleet-worker --timeout="${start_up}s"
}

step "server-side dry run"
kubectl apply --filename "$work/built" --selector pod-security.kubernetes.io/enforce
kubectl apply --filename "$work/built" --dry-run=server >"$work/dry" 2>&1 || { cat "$work/dry" >&2; fail "the API server refuses the overlay"; }
! grep -i '^warning' "$work/dry" || fail "the API server warns of the overlay"
echo "$(grep -c 'server dry run' "$work/dry") objects, no warning"

step "apply"
start=$SECONDS
kubectl apply --filename "$work/built" >/dev/null
# Ends with 1 if anything differs.
kubectl diff --filename "$work/built" || fail "\`kubectl diff\` is not empty after \`apply\`"
echo "kubectl diff: empty"
for workload in statefulset/repofleet-broker statefulset/repofleet-store deployment/repofleet-observe deployment/repofleet-worker; do
    k rollout status "$workload" --timeout="${start_up}s" ||
        fail "$workload does not get ready: do the nodes have the images? \`kind load docker-image\`"
done
figure "everything ready after $((SECONDS - start)) s"
! k run bare --image=repofleet/worker:0.1.0 --dry-run=server >"$work/bare" 2>&1 || fail "a pod without any restriction is admitted"
grep -q 'violates PodSecurity' "$work/bare" || { cat "$work/bare" >&2; fail "a bare pod is refused for another reason"; }
echo "a bare pod is refused by Pod Security"
# As an operator would, by hand.
k create secret generic by-hand --from-literal=key=value

step "a first run, and a rival"
# Without workers the first run stays open.
scale 0
start=$SECONDS
start_job first
k wait --for=jsonpath='{.status.ready}'=1 --timeout="${start_up}s" job/first >/dev/null || fail "the pod of job/first does not start"
wait_for_line first '"message":"Jobs published'
start_job rival
k wait --for=condition=Failed --timeout="${start_up}s" job/rival >/dev/null || fail "the rival has not failed"
codes=$(k get pods --selector batch.kubernetes.io/job-name=rival \
    --output jsonpath='{.items[*].status.containerStatuses[0].state.terminated.exitCode}')
[ "$codes" = 75 ] || fail "the rival's pods ended with '$codes', and not one with 75"
echo "the rival ended with 75, and was not tried again"
open first "the rival had ended"
scale 2 ready
end_of first
[ "$cached" = 0 ] || fail "$cached repositories are cached in an empty bucket"
figure "first run: $((SECONDS - start)) s"

step "a run in which the only worker is killed and the broker is deleted; then $workers workers, and a roll-out"
scale 1 ready
start=$SECONDS
start_job storm FORCE=1
wait_for_line storm '"message":"Processed [1-9][0-9]*/'
open storm "its worker was killed"
k delete pod --selector app.kubernetes.io/component=worker --grace-period=0 --force
k delete pod repofleet-broker-0
open storm "the broker was deleted"
scale "$workers"
k rollout restart deployment/repofleet-worker
k rollout status statefulset/repofleet-broker --timeout="${start_up}s"
k rollout status deployment/repofleet-worker --timeout="${start_up}s"
end_of storm
[ "$cached" = 0 ] || fail "$cached repositories are cached in a run with FORCE"
figure "the run with faults: $((SECONDS - start)) s"
digests=$processed open_failures=$failed
status=$(producer status --json)
for member in '"open":0' '"waiting":0' '"waiting_retry":0' '"dead_letters":0'; do
    [[ "${status// /}" == *"$member"* ]] || fail "the status lacks $member: $status"
done
echo "nothing is open, nothing waits, nothing is dead-lettered"

step "the next run"
start_job next
end_of next
[ "$cached" = "$digests" ] || fail "$cached are cached, and not the $digests that were digested"
[ "$open_failures" != 0 ] || [ "$processed" = 0 ] || fail "$processed are digested again"

step "delete"
kubectl delete --filename "$work/built" --selector '!pod-security.kubernetes.io/enforce' --timeout=300s >/dev/null
# Pods and Jobs go in the background.
end=$((SECONDS + start_up))
while left=$(k get deployments,statefulsets,cronjobs,jobs,pods,services,networkpolicies --output name 2>/dev/null) && [ -n "$left" ]; do
    [ "$SECONDS" -lt "$end" ] || fail "left over after $start_up s: $left"
    sleep 2
done
k get secret by-hand >/dev/null || fail "the Secret that was created by hand is gone"
echo "everything is gone but the namespace, volumes and what was created by hand"

printf '\npassed: applied, run, and survived a killed worker, a roll-out and a deleted broker\n'
