#!/usr/bin/env python3
"""Checks built manifests and units for what Kubernetes' schemas cannot express.

    check.py BUILT...             a file for each overlay, as `kustomize build` prints it
    check.py --environment FILE   the variables of an environment file
    check.py --compose FILE       compose.yaml: `docker compose up` shows the run alone
    check.py --units UNIT...      systemd units
    check.py --self-test BUILT... breaks the manifests, and expects each fault to be found

Variables, options and exit codes are read from the manuals of producer and worker, which a test of the producer
compares with the programs, and from .env.example. The limits of a worker are those that `worker run --print-limits`
prints: of the program that REPOFLEET_WORKER names, else of one that cargo builds.

Needs PyYAML.
"""

import copy
import ipaddress
import json
import math
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[2]
# Secrets that an operator creates by hand.
FOREIGN_SECRETS = {"repofleet"}
# Variables that the manuals name outside of the option tables.
FOREIGN_VARIABLES = {"GITHUB_TOKEN", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"}
FORBIDDEN = [ipaddress.ip_network(n) for n in ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128")]
# Where clusters have their DNS: namespace, labels and port of its pods; or an address on the node, port 53.
DNS_PODS = {"most clusters": ("kube-system", {"k8s-app": "kube-dns"}, 53),
            "OpenShift": ("openshift-dns", {"dns.operator.openshift.io/daemonset-dns": "default"}, 5353)}
DNS_ON_NODE = {"NodeLocal DNSCache": "169.254.20.10/32", "GKE's Cloud DNS": "169.254.169.254/32"}
SUFFIXES = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
            "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9,
         "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Programs:
    """What the programs know, from their manuals, .env.example and `worker run --print-limits`."""

    def __init__(self, manuals, env_example, limits):
        self.limits = limits
        self.variables, self.options = {}, {}
        self.numeric = set()
        row = re.compile(r"\| `(--[a-z-]+)[^`]*` \| (?:`(\w+)`)? ?\| (?:`(.*?)`)? ?\| (.*?) \|")
        for program, manual in manuals.items():
            table = manual.split("<!-- options:", 1)[1].split("<!-- end of options -->", 1)[0]
            for option, variable, default, of in row.findall(table):
                commands = {program if c == "all" else f"{program} {c}" for c in of.split(", ")}
                self.options.setdefault(option, set()).update(commands)
                if variable:
                    self.variables.setdefault(variable, set()).update(commands)
                    if amount(default) is not None:
                        self.numeric.add(variable)
        # Failures after which a scheduler does not start the producer again.
        rows = re.findall(r"^\| ([\d, ]+) \| (yes|no) \|", manuals["producer"], re.M)
        self.final = {int(code) for codes, again in rows if again == "no" for code in codes.split(", ")} - {0}
        if len(self.variables) < 20 or not self.final:
            raise SystemExit("check.py: the tables of the manuals do not read as they used to")
        # Variables that no table has are for every program: those of a bucket, and of other programs.
        exampled = set(re.findall(r"^#?([A-Z][A-Z0-9_]+)=", env_example, re.M))
        self.anywhere = FOREIGN_VARIABLES | (exampled - self.variables.keys())

    def knows(self, variable, command):
        """Whether `command`, such as `worker run`, reads `variable`."""
        return variable in self.anywhere or covers(self.variables.get(variable, ()), command)

    def has_option(self, option, command):
        return covers(self.options.get(option, ()), command)

    def memory(self, values):
        """Bytes that a worker needs with one slot at its limit and the others as usual."""
        others = (number(values, "CONCURRENCY", 1) - 1) * self.limits["usual_slot_bytes"]
        largest = number(values, "MAX_FETCH_BYTES", 1 << 30) + self.limits["slot_overhead_bytes"]
        return largest + others + self.limits["worker_bytes"]


def limits_of_worker():
    program = os.environ.get("REPOFLEET_WORKER")
    command = [program] if program else ["cargo", "run", "--quiet", "--locked", "--bin", "worker", "--"]
    result = subprocess.run([*command, "run", "--print-limits"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout)


def amount(text):
    """Seconds or bytes of an option's value, such as 90s, 1m 15s, 512MiB or 300; None if it is neither."""
    if not re.fullmatch(r"(\d+ ?[a-z]* ?)+", text.lower()):
        return None
    parts = re.findall(r"(\d+) ?([a-z]*)", text.lower())
    return sum(int(n) * UNITS[unit] for n, unit in parts) if all(unit in UNITS for _, unit in parts) else None


def covers(commands, command):
    return any(command == c or command.startswith(c + " ") for c in commands)


def quantity(text):
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(text))
    if not match or match[2] not in SUFFIXES:
        raise ValueError(f"{text!r} is no quantity")
    return Decimal(match[1]) * SUFFIXES[match[2]]


def matches(selector, labels):
    """Whether a label selector, or a Service's plain map, matches."""
    selector = selector or {}
    plain = selector.get("matchLabels", {}) if "matchLabels" in selector or "matchExpressions" in selector else selector
    if any(labels.get(k) != v for k, v in plain.items()):
        return False
    for e in selector.get("matchExpressions", []):
        found, values = labels.get(e["key"]), e.get("values", [])
        fine = {"In": found in values, "NotIn": found not in values,
                "Exists": found is not None, "DoesNotExist": found is None}
        if not fine[e["operator"]]:
            return False
    return True


class Pod:
    """A pod template and its owner."""

    def __init__(self, owner, template):
        self.owner = owner
        self.name = name_of(owner)
        self.labels = template["metadata"].get("labels", {})
        self.spec = template["spec"]
        self.containers = self.spec.get("initContainers", []) + self.spec["containers"]
        self.ports = {p.get("name"): p["containerPort"] for c in self.containers for p in c.get("ports", [])}


class OperatorPod(Pod):
    """A pod of RabbitMQ's cluster operator, which chooses its labels and ports."""

    def __init__(self, owner):
        self.owner = owner
        self.name = name_of(owner)
        self.labels = {"app.kubernetes.io/name": owner["metadata"]["name"], "app.kubernetes.io/component": "rabbitmq",
                       "app.kubernetes.io/part-of": "rabbitmq"}
        self.spec, self.containers = {}, []
        self.ports = {"amqp": 5672, "management": 15672, "prometheus": 15692}


def name_of(doc):
    return f"{doc['kind']}/{doc['metadata']['name']}"


class Checker:
    def __init__(self, docs, programs, rules=None):
        self.docs, self.programs, self.rules = docs, programs, rules
        self.problems = []
        self.pods, self.operator_pods = [], []
        for doc in docs:
            kind, spec = doc["kind"], doc.get("spec", {})
            if kind in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
                self.pods.append(Pod(doc, spec["template"]))
            elif kind == "CronJob":
                self.pods.append(Pod(doc, spec["jobTemplate"]["spec"]["template"]))
            elif kind == "RabbitmqCluster":
                self.operator_pods.append(OperatorPod(doc))

    def of(self, kind):
        return [d for d in self.docs if d["kind"] == kind]

    def named(self, kind, name):
        return next((d for d in self.of(kind) if d["metadata"]["name"] == name), None)

    def wrong(self, doc, what):
        self.problems.append(f"{name_of(doc)}: {what}")

    def need(self, holds, doc, what):
        if not holds:
            self.wrong(doc, what)

    def matching(self, selector):
        return [p for p in self.pods + self.operator_pods if matches(selector, p.labels)]

    def run(self):
        self.names()
        for doc in self.docs:
            self.lists(doc, doc, name_of(doc))
        for pod in self.pods:
            self.selectors_of(pod)
            self.restricted(pod)
            self.resources(pod)
            self.probes(pod)
            for container in pod.containers:
                self.container(pod, container)
            self.resolvers(pod)
        for check in (self.services, self.budgets, self.network, self.brokers, self.scaling, self.monitoring, self.schedule):
            check()
        return self.problems

    # Names and namespaces

    def names(self):
        seen = set()
        namespaces = {d["metadata"]["name"] for d in self.of("Namespace")}
        for doc in self.docs:
            self.need(name_of(doc) not in seen, doc, "is there twice")
            seen.add(name_of(doc))
            if doc["kind"] == "Namespace":
                enforced = doc["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
                self.need(enforced == "restricted", doc, "does not enforce the restricted profile")
            else:
                self.need(doc["metadata"].get("namespace") in namespaces, doc, "its namespace is not made here")

    def lists(self, doc, value, path):
        """The API server drops empty lists, and `kubectl diff` would show each of them for ever."""
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in inner:
            self.need(child != [], doc, f"{path}.{key} is an empty list, which the API server drops")
            self.lists(doc, child, f"{path}.{key}")

    def selectors_of(self, pod):
        selector = pod.owner["spec"].get("selector")
        if selector is not None:
            self.need(matches(selector, pod.labels), pod.owner, "its selector does not match its own pods")
        for spread in pod.spec.get("topologySpreadConstraints", []):
            self.need(matches(spread["labelSelector"], pod.labels), pod.owner, "spreads other pods than its own")
        account = pod.spec.get("serviceAccountName")
        if account:
            self.need(self.named("ServiceAccount", account), pod.owner, f"there is no ServiceAccount {account}")
        for volume in pod.spec.get("volumes", []):
            if "configMap" in volume:
                self.reference(pod, "ConfigMap", volume["configMap"]["name"])
            if "secret" in volume:
                self.reference(pod, "Secret", volume["secret"]["secretName"])

    def reference(self, pod, kind, name, key=None):
        owner = pod.owner if isinstance(pod, Pod) else pod
        doc = self.named(kind, name)
        made = {f"{d['metadata']['name']}-default-user": {"username", "password", "connection_string", "host", "port"}
                for d in self.of("RabbitmqCluster")}
        if doc is not None:
            keys = {**doc.get("data", {}), **doc.get("stringData", {})}
            self.need(key is None or key in keys, owner, f"{kind} {name} has no {key}")
        elif kind == "Secret" and name in made:
            self.need(key is None or key in made[name], owner, f"{kind} {name} has no {key}")
        else:
            self.need(kind == "Secret" and name in FOREIGN_SECRETS, owner, f"there is no {kind} {name}")

    # Pod Security, profile "restricted", and more

    def restricted(self, pod):
        spec, owner = pod.spec, pod.owner
        context = spec.get("securityContext", {})
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            self.need(not spec.get(field), owner, f"restricted: {field}")
        allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
        for volume in spec.get("volumes", []):
            self.need(set(volume) - {"name"} <= allowed, owner, f"restricted: volume {volume['name']}")
        self.need(not context.get("sysctls"), owner, "restricted: sysctls")
        self.need(spec.get("automountServiceAccountToken") is False, owner, "mounts a token")
        self.need(spec.get("enableServiceLinks") is False, owner, "takes variables from every Service")
        for container in pod.containers:
            own = container.get("securityContext", {})
            both = {**context, **own}
            say = f"restricted: container {container['name']}: "
            self.need(own.get("allowPrivilegeEscalation") is False, owner, say + "allowPrivilegeEscalation")
            self.need(not own.get("privileged"), owner, say + "privileged")
            capabilities = own.get("capabilities", {})
            self.need("ALL" in capabilities.get("drop", []), owner, say + "capabilities are not dropped")
            self.need(set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"}, owner, say + "capabilities are added")
            self.need(both.get("runAsNonRoot") is True, owner, say + "runAsNonRoot")
            self.need(both.get("runAsUser") != 0, owner, say + "runAsUser")
            profile = both.get("seccompProfile", {}).get("type")
            self.need(profile in ("RuntimeDefault", "Localhost"), owner, say + "seccompProfile")
            self.need(own.get("procMount", "Default") == "Default", owner, say + "procMount")
            self.need(own.get("readOnlyRootFilesystem") is True, owner, f"container {container['name']} may write to its root")
            for port in container.get("ports", []):
                self.need(not port.get("hostPort"), owner, say + "hostPort")

    def resources(self, pod):
        owner, ephemeral = pod.owner, 0
        for container in pod.containers:
            resources = container.get("resources", {})
            for name in ("cpu", "memory", "ephemeral-storage"):
                try:
                    request = quantity(resources.get("requests", {})[name])
                    limit = quantity(resources.get("limits", {})[name])
                except KeyError:
                    self.wrong(owner, f"container {container['name']} has no request or no limit of {name}")
                except ValueError as error:
                    self.wrong(owner, f"container {container['name']}: {name}: {error}")
                else:
                    self.need(request <= limit, owner, f"container {container['name']} requests more {name} than its limit")
                    ephemeral += limit if name == "ephemeral-storage" else 0
            if container.get("command") == ["weed"]:
                self.need("-ip.bind=127.0.0.1" in container.get("args", []), owner,
                          "opens ports of SeaweedFS that ask for no key: -ip.bind is not 127.0.0.1")
            self.need(":" in container["image"].rpartition("/")[2] and not container["image"].endswith(":latest"),
                      owner, f"image {container['image']} has no tag")
        volumes = {}
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume:
                try:
                    volumes[volume["name"]] = quantity(volume["emptyDir"]["sizeLimit"])
                except (KeyError, ValueError):
                    self.wrong(owner, f"volume {volume['name']} has no size limit")
        self.need(sum(volumes.values()) <= ephemeral, owner, "its volumes may grow beyond its ephemeral-storage limit")
        for claim in owner["spec"].get("volumeClaimTemplates", []):
            quantity(claim["spec"]["resources"]["requests"]["storage"])
        mounts = {m["name"] for c in pod.containers for m in c.get("volumeMounts", [])}
        claims = {c["metadata"]["name"] for c in owner["spec"].get("volumeClaimTemplates", [])}
        known = {v["name"] for v in pod.spec.get("volumes", [])} | claims
        self.need(mounts == known, owner, f"mounts and volumes differ: {sorted(mounts ^ known)}")

    def probes(self, pod):
        for container in pod.containers:
            names = {p.get("name") for p in container.get("ports", [])}
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                probe = container.get(kind, {})
                target = probe.get("httpGet") or probe.get("tcpSocket")
                if target:
                    self.need(target["port"] in names, pod.owner, f"{kind}: {target['port']} is no named port of its container")
                if "httpGet" in probe and program_of(container):
                    path = "/ready" if kind == "readinessProbe" else "/health"
                    self.need(probe["httpGet"]["path"] == path, pod.owner, f"{kind} asks for another page than {path}")
            self.need("livenessProbe" in container, pod.owner, f"container {container['name']} has no livenessProbe")
            self.need("readinessProbe" in container or pod.owner["kind"] == "CronJob", pod.owner,
                      f"container {container['name']} has no readinessProbe")

    # Variables and options of the programs

    def environment(self, pod, container):
        """A container's variables; None for a value that only the cluster knows. Checks that their sources exist."""
        values = {}
        for source in container.get("envFrom", []):
            for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if field in source:
                    self.reference(pod, kind, source[field]["name"])
                    doc = self.named(kind, source[field]["name"]) or {}
                    data = doc.get("data", {})
                    values.update(data if kind == "ConfigMap" else dict.fromkeys(data))
        for variable in container.get("env", []):
            values[variable["name"]] = variable.get("value")
            source = variable.get("valueFrom", {})
            for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                if field in source:
                    self.reference(pod, kind, source[field]["name"], source[field]["key"])
        return values

    def users(self, kind, name):
        """Commands of our programs that read a whole ConfigMap or Secret."""
        field = {"ConfigMap": "configMapRef", "Secret": "secretRef"}[kind]
        return {command_of(c) for p in self.pods for c in p.containers if program_of(c)
                for s in c.get("envFrom", []) if s.get(field, {}).get("name") == name}

    def container(self, pod, container):
        owner = pod.owner
        values = self.environment(pod, container)
        if not program_of(container):
            return
        command = command_of(container)
        for argument in container.get("args", [])[1:]:
            option = argument.split("=", 1)[0]
            if option.startswith("-"):
                self.need(self.programs.has_option(option, command), owner, f"`{command}` has no option {option}")
        # Of shared variables, each command reads some.
        shared = {}
        for source in container.get("envFrom", []):
            for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if field in source:
                    name = source[field]["name"]
                    for key in (self.named(kind, name) or {}).get("data", {}):
                        shared[key] = self.users(kind, name)
        for variable, value in values.items():
            known = any(self.programs.knows(variable, c) for c in shared.get(variable, {command}))
            self.need(known, owner, f"`{command}` reads no variable {variable}")
            if variable in self.programs.numeric and value:
                self.need(amount(value) is not None, owner, f"{variable}={value} is no number")
        drain = number(values, "DRAIN", 30)
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        if self.programs.knows("DRAIN", command):
            self.need(grace >= drain + self.programs.limits["hand_back_seconds"], owner, f"is killed after {grace} s, while DRAIN is {drain}")
        port = (values.get("METRICS_ADDR") or "").rpartition(":")[2]
        self.need(str(pod.ports.get("metrics")) == port, owner, f"METRICS_ADDR has port {port or 'none'}, the port metrics is another")
        if program_of(container) == "worker":
            longest = self.programs.limits["longest_job_seconds"]
            self.need(number(values, "TIMEOUT", 300) + drain <= longest, owner, "TIMEOUT and DRAIN are more than a job may take")
            self.need("CONCURRENCY" in values, owner, "CONCURRENCY depends on the node's cores")
            self.scratch(pod, container, values)
            needed = self.programs.memory(values)
            try:
                enough = quantity(container["resources"]["limits"]["memory"]) >= needed
            except (KeyError, ValueError):
                enough = True  # Reported by resources().
            self.need(enough, owner, f"one large repository ends all slots: the limit of memory is less than {needed}")

    def scratch(self, pod, container, values):
        mounts = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}
        volumes = {v["name"]: v for v in pod.spec.get("volumes", [])}
        volume = volumes.get(mounts.get(values.get("SCRATCH")), {}).get("emptyDir", {})
        largest = number(values, "MAX_FETCH_BYTES", 1 << 30) + self.programs.limits["scratch_overhead_bytes"]
        needed = number(values, "CONCURRENCY", 1) * largest
        try:
            fits = quantity(volume["sizeLimit"]) >= needed
        except (KeyError, ValueError):
            fits = False
        self.need(fits, pod.owner, f"there is no volume of {needed} bytes below SCRATCH: CONCURRENCY times the largest fetch")

    # Objects that select pods

    def services(self):
        for doc in self.of("Service"):
            pods = self.matching(doc["spec"]["selector"])
            self.need(pods, doc, "its selector matches no pod")
            for port in doc["spec"]["ports"]:
                target = port.get("targetPort", port["port"])
                self.need(all(target in p.ports or target in p.ports.values() for p in pods), doc, f"its pods have no port {target}")
        for doc in self.of("StatefulSet"):
            self.need(self.named("Service", doc["spec"]["serviceName"]), doc, "its Service is not there")

    def budgets(self):
        for doc in self.of("PodDisruptionBudget"):
            self.need(self.matching(doc["spec"]["selector"]), doc, "its selector matches no pod")
            self.need(doc["spec"].get("maxUnavailable") not in (None, 0, "0", "0%"), doc, "may block every drain")

    def network(self):
        covered = {"Ingress": set(), "Egress": set()}
        for doc in self.of("NetworkPolicy"):
            spec = doc["spec"]
            pods = self.matching(spec["podSelector"])
            self.need(pods, doc, "its podSelector matches no pod")
            for direction in spec.get("policyTypes", []):
                covered[direction].update(p.name for p in pods)
            for rule in spec.get("ingress", []):
                self.peers(doc, rule.get("from", []))
                self.policy_ports(doc, rule, pods)
            for rule in spec.get("egress", []):
                self.need(rule.get("to"), doc, "lets out to everywhere, 169.254.0.0/16 included")
                self.need(rule.get("ports"), doc, "lets out to every port")
                self.peers(doc, rule.get("to", []))
                for peer in rule.get("to", []):
                    if "podSelector" in peer and "namespaceSelector" not in peer:
                        self.policy_ports(doc, rule, self.matching(peer["podSelector"]))
                    if "ipBlock" in peer:
                        self.block(doc, peer["ipBlock"], all(p.get("port") == 53 for p in rule.get("ports", [{}])))
        for pod in self.pods:
            for direction, names in covered.items():
                self.need(pod.name in names, pod.owner, f"no NetworkPolicy holds its {direction}")

    def resolvers(self, pod):
        """Whether a pod of ours reaches the DNS of every kind of cluster."""
        if not any(program_of(c) for c in pod.containers):
            return
        rules = [rule for doc in self.of("NetworkPolicy") if matches(doc["spec"]["podSelector"], pod.labels)
                 for rule in doc["spec"].get("egress", [])]

        def reaches(peer, port):
            ports = [{"protocol": protocol, "port": port} for protocol in ("UDP", "TCP")]
            return any(peer in rule.get("to", []) and all(p in rule.get("ports", []) for p in ports) for rule in rules)

        for where, (namespace, labels, port) in DNS_PODS.items():
            peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                    "podSelector": {"matchLabels": labels}}
            self.need(reaches(peer, port), pod.owner, f"does not reach the DNS of {where}")
        for where, cidr in DNS_ON_NODE.items():
            self.need(reaches({"ipBlock": {"cidr": cidr}}, 53), pod.owner, f"does not reach {where}")

    def brokers(self):
        for doc in self.of("RabbitmqCluster"):
            version = re.search(r":(\d+)\.(\d+)\.(\d+)", doc["spec"].get("image", ""))
            legacy = doc["metadata"].get("annotations", {}).get("rabbitmq.com/legacy-startup-probe")
            self.need(version, doc, "its image names no version")
            self.need(legacy == "true" or version and tuple(map(int, version.groups())) >= (4, 2, 4), doc,
                      "the operator's start-up probe asks a page that RabbitMQ has since 4.2.4")

    def peers(self, doc, peers):
        for peer in peers:
            if "podSelector" in peer and "namespaceSelector" not in peer:
                self.need(self.matching(peer["podSelector"]), doc, "a peer's podSelector matches no pod")

    def policy_ports(self, doc, rule, pods):
        for port in rule.get("ports", []):
            if isinstance(port.get("port"), str):
                self.need(all(port["port"] in p.ports for p in pods), doc, f"its pods have no port {port['port']}")

    def block(self, doc, block, only_names):
        cidr = ipaddress.ip_network(block["cidr"])
        excepted = [ipaddress.ip_network(n) for n in block.get("except", [])]
        for network in excepted:
            self.need(network.version == cidr.version and network.subnet_of(cidr), doc, f"{network} is no part of {cidr}")
        if only_names and str(cidr) in DNS_ON_NODE.values():
            return
        for forbidden in (f for f in FORBIDDEN if f.version == cidr.version and f.overlaps(cidr)):
            held = any(forbidden.subnet_of(n) for n in excepted if n.version == forbidden.version)
            self.need(held, doc, f"lets out to {forbidden}")

    # Autoscaling

    def scaling(self):
        scalers = {}
        for doc in self.of("HorizontalPodAutoscaler") + self.of("ScaledObject"):
            reference = doc["spec"]["scaleTargetRef"]
            target = self.named(reference.get("kind", "Deployment"), reference["name"])
            self.need(target, doc, f"its target {reference['name']} is not there")
            if not target:
                continue
            self.need(name_of(target) not in scalers, doc, "something else scales the same")
            most = doc["spec"].get("maxReplicas") or doc["spec"].get("maxReplicaCount") or 0
            scalers[name_of(target)] = most
            self.need("replicas" not in target["spec"], doc, "its target sets a number of its own")
            if doc["kind"] == "ScaledObject":
                self.scaled_object(doc, target)
        for pod in self.pods:
            for container in pod.containers:
                if program_of(container) == "worker":
                    annotations = pod.owner["metadata"].get("annotations", {})
                    budget = int(annotations.get("repofleet/clone-budget", 0))
                    slots = number(self.environment(pod, container), "CONCURRENCY", 1)
                    most = scalers.get(pod.name, pod.owner["spec"].get("replicas", 1))
                    most += surge(pod.owner, most)
                    self.need(0 < most * slots <= budget, pod.owner, f"{most} workers of {slots} slots are over the clone budget of {budget}")

    def scaled_object(self, doc, target):
        spec = doc["spec"]
        self.need(spec.get("cooldownPeriod", 300) > self.programs.limits["longest_retry_seconds"], doc, "ends workers while jobs wait for a retry")
        self.need(spec.get("minReplicaCount", 0) == 0, doc, "does not scale to zero")
        pod = next(p for p in self.pods if p.owner is target)
        prefix = self.environment(pod, pod.containers[-1]).get("QUEUE_PREFIX") or "repofleet"
        for trigger in spec["triggers"]:
            asked = trigger["metadata"]
            self.need(asked.get("protocol") == "http", doc, "protocol is not http: unacknowledged messages do not count")
            self.need(asked.get("excludeUnacknowledged", "false") == "false", doc, "unacknowledged messages do not count")
            self.need(asked.get("queueName") == f"{prefix}.jobs", doc, f"its queue is not {prefix}.jobs")
            host = (urlsplit(asked.get("host", "")).hostname or "").split(".")
            broker = self.named("Service", host[0]) or self.named("RabbitmqCluster", host[0])
            self.need(broker and host[1:2] == [broker["metadata"]["namespace"]], doc, f"there is no broker at {asked.get('host')}")
            authentication = self.named("TriggerAuthentication", trigger.get("authenticationRef", {}).get("name"))
            self.need(authentication, doc, "its TriggerAuthentication is not there")
            for secret in (authentication or {}).get("spec", {}).get("secretTargetRef", []):
                self.reference(authentication, "Secret", secret["name"], secret["key"])

    # Monitoring

    def monitoring(self):
        for doc in self.of("PodMonitor"):
            pods = self.matching(doc["spec"]["selector"])
            self.need(pods, doc, "its selector matches no pod")
            for endpoint in doc["spec"]["podMetricsEndpoints"]:
                self.need(all(endpoint["port"] in p.ports for p in pods), doc, f"its pods have no port {endpoint['port']}")
        if self.of("PodMonitor") and self.rules is not None:
            self.need(self.of("PrometheusRule"), self.of("PodMonitor")[0], "there is no PrometheusRule: run prometheus-rule.sh")
        # Which of our programs get a broker's address from anything but a Secret created by hand.
        told = {command_of(c): "BROKER_URL" in self.environment(p, c)
                for p in self.pods for c in p.containers if program_of(c)}
        for doc in self.of("PrometheusRule"):
            self.need(told.get("producer observe") == told.get("worker run"), doc,
                      "there is no `producer observe` on the workers' broker, without which most alerts cannot fire")
            self.need(self.rules is not None and doc["spec"] == self.rules, doc,
                      "is not deploy/prometheus/alerts.yml: run prometheus-rule.sh")

    def schedule(self):
        for doc in self.of("CronJob"):
            spec, job = doc["spec"], doc["spec"]["jobTemplate"]["spec"]
            self.need(re.fullmatch(r"\S+( \S+){4}", spec["schedule"]), doc, "its schedule has not five fields")
            self.need(spec.get("timeZone"), doc, "its time zone is whatever the cluster's is")
            self.need(spec.get("concurrencyPolicy") == "Forbid", doc, "two may run at once")
            self.need(spec.get("startingDeadlineSeconds", 0) >= 60, doc, "has no starting deadline")
            self.need(job.get("activeDeadlineSeconds", 0) > 0, doc, "has no deadline")
            for field in ("successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
                self.need(spec.get(field, 0) > 0, doc, f"has no {field}")
            pod = job["template"]["spec"]
            self.need(pod.get("restartPolicy") == "Never", doc, "restarts in place, where no policy looks at its code")
            names = {c["name"] for c in pod["containers"]}
            rules = job.get("podFailurePolicy", {}).get("rules", [])
            for rule in rules:
                name = rule.get("onExitCodes", {}).get("containerName")
                self.need(name is None or name in names, doc, f"podFailurePolicy: no container {name}")
            final = {c for r in rules if r["action"] == "FailJob" for c in r.get("onExitCodes", {}).get("values", [])}
            self.need(final == self.programs.final, doc, f"fails at once after {sorted(final)}, not after {sorted(self.programs.final)}")
            ignored = {c["type"] for r in rules if r["action"] == "Ignore" for c in r.get("onPodConditions", [])}
            self.need("DisruptionTarget" in ignored, doc, "an eviction spends a retry")
            self.need(job.get("backoffLimit", 6) >= 8, doc, "does not survive twenty minutes without the feed's server")


def surge(deployment, replicas):
    """Number of pods beyond `replicas` during a roll-out."""
    strategy = deployment["spec"].get("strategy", {})
    if strategy.get("type") == "Recreate":
        return 0
    most = strategy.get("rollingUpdate", {}).get("maxSurge", "25%")
    return most if isinstance(most, int) else math.ceil(replicas * int(most.rstrip("%")) / 100)


def program_of(container):
    match = re.search(r"(?:^|/)repofleet/(worker|producer)(?=[:@]|$)", container["image"])
    return match and match[1]


def command_of(container):
    return f"{program_of(container)} {container.get('args', [''])[0]}"


def number(values, variable, default):
    value = amount(values.get(variable) or "")
    return default if value is None else value


def check_environment(text, programs):
    """Problems of a file of NAME=value lines. Lines that are commented out count too."""
    problems = []
    for name, value in re.findall(r"^#?([A-Z][A-Z0-9_]*)=(.*)$", text, re.M):
        if name not in programs.variables and name not in programs.anywhere:
            problems.append(f"no program reads {name}")
        elif name in programs.numeric and value and amount(value) is None:
            problems.append(f"{name}={value} is no number")
    return problems


def check_compose(text):
    """Services whose logs would hide the run's."""
    services = yaml.safe_load(text)["services"]
    return [f"shows the log of {name} between the run's lines: no `attach: false`" for name, service in services.items()
            if name != "producer" and service.get("attach") is not False]


def seconds(text):
    unit = {"": 1, "s": 1, "min": 60, "h": 3600}
    return sum(int(n) * unit[u] for n, u in re.findall(r"(\d+)\s*([a-z]*)", text))


def check_unit(name, text, programs, names):
    """Problems of a unit; `names` are the file names of all units."""
    settings = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", text, re.M):
        settings.setdefault(key, []).append(value)
    last = {key: values[-1] for key, values in settings.items()}
    if name.endswith(".timer"):
        service = last.get("Unit", name.replace(".timer", ".service"))
        return [] if service in names and "OnCalendar" in last else [f"does not start {service}, or never"]
    problems = []
    program, *arguments = last["ExecStart"].split()
    command = f"{program.rpartition('/')[2]} {arguments[0]}"
    problems += [f"`{command}` has no option {a}" for a in arguments[1:]
                 if a.startswith("-") and not programs.has_option(a.split("=")[0], command)]
    values = dict(pair.split("=", 1) for line in settings.get("Environment", []) for pair in line.split())
    problems += [f"`{command}` reads no variable {v}" for v in values if not programs.knows(v, command)]
    problems += [f"{v}={values[v]} is no number" for v in programs.numeric & values.keys() if amount(values[v]) is None]
    drain = number(values, "DRAIN", 30)
    if seconds(last.get("TimeoutStopSec", "90")) < drain + programs.limits["hand_back_seconds"]:
        problems.append(f"is killed before DRAIN={drain} is over")
    if last.get("KillMode") != "mixed":
        problems.append("SIGTERM would reach the slots as well: KillMode is not mixed")
    if last.get("Restart") != "on-failure":
        problems.append("is not started again after a failure")
    fine, final = (set(map(int, last.get(key, "").split())) for key in ("SuccessExitStatus", "RestartPreventExitStatus"))
    if command.startswith("producer"):
        if fine != {75}:
            problems.append("counts something else as a success than that another producer runs")
        if final | fine != programs.final:
            problems.append(f"is not started again after {sorted(final)}, which is not {sorted(programs.final - fine)}")
    elif fine or final != {2}:
        problems.append("a worker is started again after every code but 2")
    if "MemoryMax" not in last or quantity(last["MemoryMax"].replace("G", "Gi")) < programs.memory(values):
        problems.append(f"one large repository ends all slots: MemoryMax is less than {programs.memory(values)}")
    return problems


# The self-test: one small fault each, and part of the message it must cause.

def find(docs, kind, name):
    return next(d for d in docs if d["kind"] == kind and d["metadata"]["name"].startswith(name))


def worker(docs):
    return find(docs, "Deployment", "repofleet-worker")


def pod_of(docs):
    return worker(docs)["spec"]["template"]["spec"]


def container_of(docs):
    return pod_of(docs)["containers"][0]


def job_of(docs):
    return find(docs, "CronJob", "repofleet-producer")["spec"]


def rules_of(docs):
    return job_of(docs)["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]


def data_of(docs, name):
    return find(docs, "ConfigMap", name)["data"]


def trigger_of(docs):
    return find(docs, "ScaledObject", "")["spec"]["triggers"][0]


def policy_of(docs):
    return find(docs, "NetworkPolicy", "repofleet")["spec"]


def outside_of(docs):
    return next(r for r in policy_of(docs)["egress"] if r["ports"][0]["port"] == 443)


def store_of(docs):
    return find(docs, "StatefulSet", "repofleet-store")["spec"]["template"]["spec"]["containers"][0]


def put(place, key, value):
    place[key] = value


def drop(place, key):
    del place[key]


def without(docs, kind):
    docs[:] = [d for d in docs if d["kind"] != kind]


FAULTS = [
    ("selector", lambda d: put(worker(d)["spec"]["template"]["metadata"]["labels"], "app.kubernetes.io/component", "wrker"), "does not match its own pods"),
    ("budget of nobody", lambda d: put(find(d, "PodDisruptionBudget", "repofleet-worker")["spec"]["selector"]["matchLabels"], "app.kubernetes.io/component", "x"), "matches no pod"),
    ("budget that blocks", lambda d: put(find(d, "PodDisruptionBudget", "repofleet-worker")["spec"], "maxUnavailable", 0), "block every drain"),
    ("service", lambda d: put(find(d, "Service", "repofleet-broker")["spec"]["ports"][0], "targetPort", "ampq"), "no port ampq"),
    ("account", lambda d: put(pod_of(d), "serviceAccountName", "x"), "no ServiceAccount x"),
    ("namespace", lambda d: put(worker(d)["metadata"], "namespace", "default"), "namespace is not made here"),
    ("twice", lambda d: d.append(copy.deepcopy(worker(d))), "is there twice"),
    ("profile", lambda d: find(d, "Namespace", "")["metadata"]["labels"].clear(), "does not enforce"),
    ("config map", lambda d: put(container_of(d)["envFrom"][0]["configMapRef"], "name", "x"), "no ConfigMap x"),
    ("secret", lambda d: put(container_of(d)["env"][0]["valueFrom"]["secretKeyRef"], "name", "x"), "no Secret x"),
    ("secret's key", lambda d: put(container_of(d)["env"][0]["valueFrom"]["secretKeyRef"], "key", "uri"), "has no uri"),
    ("quantity", lambda d: put(container_of(d)["resources"]["limits"], "memory", "2GB"), "is no quantity"),
    ("request over limit", lambda d: put(container_of(d)["resources"]["requests"], "memory", "4Gi"), "requests more memory"),
    ("no limit", lambda d: drop(container_of(d)["resources"]["limits"], "ephemeral-storage"), "no limit of ephemeral-storage"),
    ("volume without end", lambda d: put(pod_of(d)["volumes"][0], "emptyDir", {}), "has no size limit"),
    ("volume over limit", lambda d: put(pod_of(d)["volumes"][0]["emptyDir"], "sizeLimit", "9Gi"), "grow beyond"),
    ("scratch too small", lambda d: put(data_of(d, "repofleet-worker"), "CONCURRENCY", "5"), "below SCRATCH"),
    ("memory", lambda d: put(container_of(d)["resources"]["limits"], "memory", "2Gi"), "one large repository"),
    ("unmounted", lambda d: container_of(d)["volumeMounts"].pop(), "mounts and volumes differ"),
    ("probe's port", lambda d: put(container_of(d)["livenessProbe"]["httpGet"], "port", "http"), "no named port"),
    ("probe's number", lambda d: put(container_of(d)["readinessProbe"]["httpGet"], "port", 9100), "no named port"),
    ("probe's page", lambda d: put(container_of(d)["readinessProbe"]["httpGet"], "path", "/health"), "another page"),
    ("no probe", lambda d: drop(container_of(d), "livenessProbe"), "no livenessProbe"),
    ("metrics' port", lambda d: put(container_of(d)["ports"][0], "containerPort", 9090), "port metrics is another"),
    ("variable", lambda d: put(data_of(d, "repofleet-worker"), "CONCURENCY", "4"), "reads no variable CONCURENCY"),
    ("another's variable", lambda d: put(data_of(d, "repofleet-worker"), "FEED", "x"), "reads no variable FEED"),
    ("shared variable", lambda d: put(data_of(d, "repofleet-"), "STORE", "x"), "reads no variable STORE"),
    ("number", lambda d: put(data_of(d, "repofleet-worker"), "DRAIN", "soon"), "is no number"),
    ("option", lambda d: container_of(d)["args"].append("--feed=x"), "has no option --feed"),
    ("drain", lambda d: put(data_of(d, "repofleet-worker"), "DRAIN", "90"), "while DRAIN is 90"),
    ("long jobs", lambda d: put(data_of(d, "repofleet-worker"), "TIMEOUT", "1800"), "more than a job may take"),
    ("tag", lambda d: put(container_of(d), "image", "repofleet/worker"), "has no tag"),
    ("root", lambda d: drop(pod_of(d)["securityContext"], "runAsNonRoot"), "runAsNonRoot"),
    ("user 0", lambda d: put(container_of(d)["securityContext"], "runAsUser", 0), "runAsUser"),
    ("seccomp", lambda d: drop(pod_of(d)["securityContext"], "seccompProfile"), "seccompProfile"),
    ("capabilities", lambda d: drop(container_of(d)["securityContext"], "capabilities"), "capabilities are not dropped"),
    ("escalation", lambda d: drop(container_of(d)["securityContext"], "allowPrivilegeEscalation"), "allowPrivilegeEscalation"),
    ("host path", lambda d: put(pod_of(d)["volumes"], 0, {"name": "scratch", "hostPath": {"path": "/"}}), "restricted: volume"),
    ("host network", lambda d: put(pod_of(d), "hostNetwork", True), "hostNetwork"),
    ("token", lambda d: drop(pod_of(d), "automountServiceAccountToken"), "mounts a token"),
    ("metadata address", lambda d: outside_of(d)["to"][0]["ipBlock"]["except"].remove("169.254.0.0/16"), "lets out to 169.254.0.0/16"),
    ("part of it", lambda d: outside_of(d)["to"].append({"ipBlock": {"cidr": "169.254.169.254/32"}}), "lets out to 169.254.0.0/16"),
    ("more than names", lambda d: policy_of(d)["egress"][2]["ports"].append({"protocol": "TCP", "port": 80}), "lets out to 169.254.0.0/16"),
    ("everywhere", lambda d: drop(outside_of(d), "to"), "lets out to everywhere"),
    ("every port", lambda d: drop(outside_of(d), "ports"), "every port"),
    ("empty list", lambda d: put(policy_of(d), "ingress", []), "NetworkPolicy/repofleet.spec.ingress is an empty list"),
    ("empty list further in", lambda d: put(container_of(d)["securityContext"]["capabilities"], "add", []), "capabilities.add is an empty list"),
    ("DNS", lambda d: policy_of(d)["egress"].pop(0), "does not reach the DNS of most clusters"),
    ("DNS over TCP", lambda d: policy_of(d)["egress"][0]["ports"].pop(), "does not reach the DNS of most clusters"),
    ("OpenShift's DNS", lambda d: put(policy_of(d)["egress"][1]["ports"][0], "port", 53), "does not reach the DNS of OpenShift"),
    ("DNS on the node", lambda d: policy_of(d)["egress"][2]["to"].pop(0), "does not reach NodeLocal DNSCache"),
    ("GKE's DNS", lambda d: policy_of(d)["egress"][2]["to"].pop(), "does not reach GKE's Cloud DNS"),
    ("store's other ports", lambda d: put(store_of(d), "args", ["mini", "-ip.bind=0.0.0.0"]), "ask for no key"),
    ("old broker", lambda d: put(find(d, "RabbitmqCluster", "")["spec"], "image", "rabbitmq:4.1.8-management"), "has since 4.2.4"),
    ("policy of nobody", lambda d: put(policy_of(d)["podSelector"]["matchLabels"], "app.kubernetes.io/name", "x"), "matches no pod"),
    ("no policy", lambda d: without(d, "NetworkPolicy"), "no NetworkPolicy holds"),
    ("forbid", lambda d: put(job_of(d), "concurrencyPolicy", "Allow"), "two may run"),
    ("deadline", lambda d: drop(job_of(d)["jobTemplate"]["spec"], "activeDeadlineSeconds"), "has no deadline"),
    ("starting deadline", lambda d: drop(job_of(d), "startingDeadlineSeconds"), "no starting deadline"),
    ("code 75", lambda d: rules_of(d)[-1]["onExitCodes"]["values"].remove(75), "fails at once after"),
    ("code 69", lambda d: rules_of(d)[-1]["onExitCodes"]["values"].append(69), "fails at once after"),
    ("eviction", lambda d: rules_of(d).pop(0), "spends a retry"),
    ("retries", lambda d: put(job_of(d)["jobTemplate"]["spec"], "backoffLimit", 6), "does not survive"),
    ("surge", lambda d: put(worker(d)["spec"]["strategy"]["rollingUpdate"], "maxSurge", "4000%"), "over the clone budget"),
    ("clone budget", lambda d: put(worker(d)["metadata"]["annotations"], "repofleet/clone-budget", "7"), "over the clone budget"),
    ("scaler's target", lambda d: put(find(d, "ScaledObject", "")["spec"]["scaleTargetRef"], "name", "x"), "its target x"),
    ("scaler's number", lambda d: put(find(d, "ScaledObject", "")["spec"], "maxReplicaCount", 40), "over the clone budget"),
    ("two numbers", lambda d: put(worker(d)["spec"], "replicas", 3) if find(d, "ScaledObject", "") else None, "a number of its own"),
    ("queue", lambda d: put(trigger_of(d)["metadata"], "queueName", "jobs"), "its queue is not"),
    ("protocol", lambda d: put(trigger_of(d)["metadata"], "protocol", "amqp"), "protocol is not http"),
    ("unacknowledged", lambda d: put(trigger_of(d)["metadata"], "excludeUnacknowledged", "true"), "do not count"),
    ("broker", lambda d: put(trigger_of(d)["metadata"], "host", "http://repofleet-broker.default:15672/"), "no broker at"),
    ("cooldown", lambda d: put(find(d, "ScaledObject", "")["spec"], "cooldownPeriod", 30), "wait for a retry"),
    ("authentication", lambda d: put(trigger_of(d)["authenticationRef"], "name", "x"), "TriggerAuthentication is not there"),
    ("authentication's secret", lambda d: put(find(d, "TriggerAuthentication", "")["spec"]["secretTargetRef"][0], "name", "x"), "no Secret x"),
    ("autoscaler's target", lambda d: put(find(d, "HorizontalPodAutoscaler", "")["spec"]["scaleTargetRef"], "name", "x"), "its target x"),
    ("monitor of nobody", lambda d: put(find(d, "PodMonitor", "")["spec"]["selector"]["matchLabels"], "app.kubernetes.io/name", "x"), "matches no pod"),
    ("monitor's port", lambda d: put(find(d, "PodMonitor", "")["spec"]["podMetricsEndpoints"][0], "port", "web"), "no port web"),
    ("observer", lambda d: find(d, "PrometheusRule", "") and d.remove(find(d, "Deployment", "repofleet-observe")), "no `producer observe`"),
    ("observer's broker", lambda d: find(d, "PrometheusRule", "") and drop(find(d, "Deployment", "repofleet-observe")["spec"]["template"]["spec"]["containers"][0], "env"), "no `producer observe`"),
    ("other rules", lambda d: d.append({"kind": "PrometheusRule", "metadata": {"name": "x", "namespace": "repofleet"}, "spec": {"groups": []}}), "is not deploy/prometheus"),
]


def self_test(overlays, programs):
    failed = []
    for name, spoil, expected in FAULTS:
        tried = found = 0
        for docs in overlays:
            broken = copy.deepcopy(docs)
            try:
                spoil(broken)
            except StopIteration:
                continue  # This overlay has no such object.
            tried += 1
            found += any(expected in p for p in Checker(broken, programs, None).run())
        if not tried or found < tried:
            failed.append(f"{name}: found in {found} of {tried} overlays")
    for text, expected in (("CONCURENCY=4\n", "no program reads"), ("#DRAIN=soon\n", "is no number")):
        if not any(expected in p for p in check_environment(text, programs)):
            failed.append(f"environment file: {text!r}")
    if not check_compose("services: {producer: {}, s3: {attach: true}}"):
        failed.append("compose.yaml: another log between the run's lines")
    unit = (ROOT / "deploy/systemd/repofleet-producer.service").read_text()
    units = [("ExecStart=/usr/local/bin/producer run", "ExecStart=/usr/local/bin/producer run --fed=x", "has no option --fed"),
             ("DRAIN=60", "DRAYN=60", "reads no variable DRAYN"), ("DRAIN=60", "DRAIN=soon", "is no number"),
             ("TimeoutStopSec=90", "TimeoutStopSec=1min", "before DRAIN=60"), ("=mixed", "=control-group", "KillMode"),
             ("SuccessExitStatus=75", "", "another producer runs"), ("SuccessExitStatus=75", "SuccessExitStatus=75 143", "another producer runs"),
             ("RestartPreventExitStatus=2 3 65", "RestartPreventExitStatus=2 65 69", "is not started again"),
             ("Restart=on-failure", "", "after a failure"), ("MemoryMax=3G", "MemoryMax=1G", "MemoryMax is less")]
    for good, bad, expected in units:
        if good not in unit or not any(expected in p for p in check_unit("x.service", unit.replace(good, bad), programs, [])):
            failed.append(f"unit: {bad}")
    faults = len(FAULTS) + len(units) + 3
    for problem in failed:
        print(f"not found: {problem}")
    print(f"self-test: {faults - len(failed)} of {faults} faults were found")
    return not failed


def main(arguments):
    mode = arguments.pop(0) if arguments and arguments[0].startswith("--") else None
    if not arguments or mode not in (None, "--environment", "--compose", "--units", "--self-test"):
        raise SystemExit(__doc__)
    manuals = {p: (ROOT / p / "README.md").read_text() for p in ("producer", "worker")}
    programs = Programs(manuals, (ROOT / ".env.example").read_text(), limits_of_worker())
    if mode == "--environment":
        problems = [f"{f}: {p}" for f in arguments for p in check_environment(Path(f).read_text(), programs)]
    elif mode == "--compose":
        problems = [f"{f}: {p}" for f in arguments for p in check_compose(Path(f).read_text())]
    elif mode == "--units":
        names = [Path(f).name for f in arguments]
        problems = [f"{n}: {p}" for f, n in zip(arguments, names) for p in check_unit(n, Path(f).read_text(), programs, names)]
    else:
        overlays = {f: [d for d in yaml.safe_load_all(Path(f).read_text()) if d] for f in arguments}
        if mode == "--self-test":
            return self_test(overlays.values(), programs)
        alerts = ROOT / "deploy/prometheus/alerts.yml"
        rules = yaml.safe_load(alerts.read_text()) if alerts.exists() else None
        problems = [f"{f}: {p}" for f, docs in overlays.items() for p in Checker(docs, programs, rules).run()]
    for problem in problems:
        print(problem)
    return not problems


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
