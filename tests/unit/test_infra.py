"""What a cluster runs on: the launcher's file, images, manifests, rules, dashboard.

Each is held against the schema of who reads it, against infra/constraints.txt, and against a few
rules of ours. No cluster, no container and no network is needed.
"""

import ast
import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import check_jsonschema
import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import ray
from ray._private import ray_constants
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from ruamel.yaml import YAML

from orchestrator.cluster.plan import MOST_VARIABLE, Resources, told_nodes

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
KUBERNETES = "1.34"
COMPOSE = INFRA / "mlflow" / "compose.yaml"
YAMLS = sorted([ROOT / "cluster.yaml", *INFRA.rglob("*.yaml")])
DOCKERFILES = sorted(INFRA.rglob("Dockerfile"))
OURS = {
    "ray_orchestrator_tokens_per_second",
    "ray_orchestrator_step_seconds",
    "ray_orchestrator_collective_seconds",
    "ray_orchestrator_loss",
    "ray_orchestrator_step",
    "ray_orchestrator_restarts",
}


def documents(path: Path) -> list[Any]:
    # ruamel refuses a key that stands twice.
    return list(YAML(typ="safe").load_all(path))


def constraints() -> dict[str, str]:
    lines = (INFRA / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower(): version for name, version in pins}


def objects() -> list[tuple[Path, dict[str, Any]]]:
    """Every Kubernetes object of every file."""
    found = [(path, document) for path in YAMLS for document in documents(path)]
    return [(path, document) for path, document in found if "apiVersion" in document]


OBJECTS = objects()
NAMES = [f"{path.relative_to(INFRA)}:{found['kind']}" for path, found in OBJECTS]
CUSTOM = json.loads((INFRA / "schemas" / "crds.json").read_text())


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, (dict, list)):
            yield from walk(inner)


def pod_specs(value: Any) -> list[dict[str, Any]]:
    return [inner for inner in walk(value) if "containers" in inner]


def check_object(document: dict[str, Any]) -> None:
    """Refuse what the cluster would refuse, and keys it would drop."""
    schema = CUSTOM.get(f"{document['apiVersion']}/{document['kind']}")
    if schema is None:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    jsonschema.Draft202012Validator(schema).validate(document["spec"])
    for spec in pod_specs(document["spec"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_there_is_something_to_check() -> None:
    kinds = {found["kind"] for _, found in OBJECTS}
    assert {"RayCluster", "RayJob", "ClusterQueue", "Deployment", "PodMonitor"} <= kinds
    assert len(DOCKERFILES) == 2 and len(YAMLS) > 6


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_holds_no_key_twice(path: Path) -> None:
    assert all(isinstance(document, dict) for document in documents(path))


def test_the_launcher_takes_cluster_yaml() -> None:
    (config,) = documents(ROOT / "cluster.yaml")
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    # Ray gives its defaults to providers of its own only, and reads these keys of any.
    rays_own = {**config, "provider": {**config["provider"], "type": "aws"}}
    assert set(prepare_config(rays_own)) == set(prepared)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    spot = types["gpu"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert spot["min_workers"] == 0 < spot["max_workers"] == config["max_workers"]
    for node in types.values():
        # Ray's own default image is of 2022 and knows no GPU of today.
        assert node["node_config"]["ImageId"].startswith("resolve:ssm:")
    assert config["idle_timeout_minutes"] > 0
    options = " ".join(config["docker"]["run_options"])
    each, count = spot["resources"], config["max_workers"]
    assert f"{MOST_VARIABLE}={count}xCPU={each['CPU']},GPU={each['GPU']}" in options
    assert "RAY_AUTH_MODE=token" in options and "-v /mnt/shared:/mnt/shared" in options
    # Prometheus reads Ray's list of nodes beside the container; workers reach buckets too.
    assert "-v /tmp/ray:/tmp/ray" in options
    assert all("IamInstanceProfile" in node["node_config"] for node in types.values())
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert any("nfs4" in line for line in config["initialization_commands"])


def test_the_cluster_on_kubernetes_says_what_it_grows_to() -> None:
    (cluster,) = [found for _, found in OBJECTS if found["kind"] == "RayCluster"]
    (group,) = cluster["spec"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    (head,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (told,) = [entry["value"] for entry in head["env"] if entry["name"] == MOST_VARIABLE]
    requests, count = worker["resources"]["requests"], group["maxReplicas"]
    cpus, gpus = (int(requests[name]) for name in ("cpu", "nvidia.com/gpu"))
    assert told_nodes(told) == (Resources(cpus, gpus),) * count


def test_the_launcher_refuses_a_key_it_does_not_know() -> None:
    (config,) = documents(ROOT / "cluster.yaml")
    config["available_node_types"]["gpu"]["minimum_workers"] = 1
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config))


@pytest.mark.parametrize(("path", "document"), OBJECTS, ids=NAMES)
def test_kubernetes_takes_the_object(path: Path, document: dict[str, Any]) -> None:
    check_object(document)
    if document["kind"] not in ("Namespace", "ResourceFlavor", "ClusterQueue"):
        assert document["metadata"]["namespace"] == "orchestrator"


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "ClusterQueue", "Deployment"])
def test_a_misspelt_key_is_refused(kind: str) -> None:
    (document,) = [copy.deepcopy(found) for _, found in OBJECTS if found["kind"] == kind]
    places = [document["spec"], *pod_specs(document["spec"])[:1]]
    places += [container for pod in places[1:] for container in pod["containers"]]
    places += [inner for inner in walk(document["spec"]) if "nominalQuota" in inner][:1]
    assert len(places) > 1
    for place in places:
        place["mispelt"] = 1
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check_object(document)
        del place["mispelt"]
    check_object(document)


@pytest.mark.parametrize(("path", "document"), OBJECTS, ids=NAMES)
def test_containers_have_limits_and_no_rights(path: Path, document: dict[str, Any]) -> None:
    containers = [c for spec in pod_specs(document) for c in spec["containers"]]
    # KubeRay makes a container of these.
    containers += [
        inner["autoscalerOptions"] for inner in walk(document) if "autoscalerOptions" in inner
    ]
    for container in containers:
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert {"cpu", "memory"} <= set(limits) and {"cpu", "memory"} <= set(requests)
        assert limits.get("nvidia.com/gpu") == requests.get("nvidia.com/gpu")
        rights = container["securityContext"]
        assert rights["runAsNonRoot"] is True and rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
    for spec in pod_specs(document):
        assert spec["securityContext"]["runAsUser"] > 0


def test_a_ray_cluster_wants_a_token_and_scales() -> None:
    (cluster,) = [found["spec"] for _, found in OBJECTS if found["kind"] == "RayCluster"]
    (job,) = [found for _, found in OBJECTS if found["kind"] == "RayJob"]
    assert cluster["enableInTreeAutoscaling"] is True
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == 0 < group["maxReplicas"]
    # Kueue admits no cluster that resizes itself, and admits this one as a whole.
    queues = {found["metadata"]["name"] for _, found in OBJECTS if found["kind"] == "LocalQueue"}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] in queues
    inside = job["spec"]["rayClusterSpec"]
    assert inside["enableInTreeAutoscaling"] is False
    (group,) = inside["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    script = job["spec"]["entrypoint"].split()[1]
    assert (ROOT / Path(script).relative_to("/opt/orchestrator")).is_file()
    for spec in (cluster, inside):
        assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        head = spec["headGroupSpec"]
        assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
        for pod in pod_specs(spec):
            claims = [v.get("persistentVolumeClaim") for v in pod["volumes"]]
            assert {"claimName": "shared"} in claims
    (claim,) = [found for _, found in OBJECTS if found["kind"] == "PersistentVolumeClaim"]
    assert claim["metadata"]["name"] == "shared" and claim["spec"]["accessModes"] == [
        "ReadWriteMany"
    ]


def test_a_job_fits_its_queue() -> None:
    (job,) = [found["spec"] for _, found in OBJECTS if found["kind"] == "RayJob"]
    (queue,) = [found["spec"] for _, found in OBJECTS if found["kind"] == "ClusterQueue"]
    (group,) = queue["resourceGroups"]
    quota = {r["name"]: amount(r["nominalQuota"]) for r in group["flavors"][0]["resources"]}
    assert set(quota) == set(group["coveredResources"])
    cluster = job["rayClusterSpec"]
    pods = [(1, cluster["headGroupSpec"]), (1, job["submitterPodTemplate"])]
    pods += [(workers["replicas"], workers) for workers in cluster["workerGroupSpecs"]]
    for name, most in quota.items():
        wanted = sum(
            count * amount(container["resources"]["requests"].get(name, 0))
            for count, pod in pods
            for spec in pod_specs(pod)
            for container in spec["containers"]
        )
        assert 0 < wanted <= most, name


def amount(quantity: Any) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(m|[KMGT]i)?", str(quantity)).groups()  # type: ignore[union-attr]
    scale = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * scale.get(unit, 1)


def test_docker_compose_takes_the_file() -> None:
    (compose,) = documents(COMPOSE)
    schemas = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor"
    schema = json.loads((schemas / "compose-spec.json").read_text())
    jsonschema.validate(compose, schema)
    compose["services"]["mlflow"]["environments"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(compose, schema)
    for service in compose["services"].values():
        assert service["user"].split(":")[0] not in ("0", "root")
        assert service["cap_drop"] == ["ALL"] and service["mem_limit"] and service["cpus"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    build = compose["services"]["mlflow"]["build"]
    assert ((COMPOSE.parent / build["context"]).resolve() / build["dockerfile"]).is_file()


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, each on one line."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, " ".join(rest.split())) for word, rest in (s.split(" ", 1) for s in lines if s)]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_images_are_pinned_and_not_root(path: Path) -> None:
    found = instructions(path)
    bases = [rest for word, rest in found if word == "FROM"]
    assert bases and all(re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base) for base in bases)
    users = [rest for word, rest in found if word == "USER"]
    assert users == ["1000"]
    installs = [i for _, rest in found for i in re.findall(r"pip install[^&;]*", rest)]
    assert installs and all("constraints.txt" in i or "--no-deps" in i for i in installs)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for word, rest in found:
        if word == "COPY":
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            for source in sources:
                assert (ROOT / source).exists()
                assert f"!{source}" in ignored or f"!{source}/**" in ignored


def test_ray_takes_the_environment_of_submitted_jobs() -> None:
    (environment,) = documents(ROOT / "jobs" / "runtime_env.yaml")
    assert RuntimeEnv(**environment).to_dict() == environment
    assert ".git" in environment["excludes"]
    # Longer than a step, and than a checkpoint to slow storage.
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 300
    for script in ("finetune", "sweep"):
        text = " ".join((ROOT / "jobs" / f"{script}.py").read_text().split())
        assert f"--runtime-env jobs/runtime_env.yaml -- \\ python jobs/{script}.py" in text
    with pytest.raises((TypeError, ValueError)):
        RuntimeEnv(excludes=".git")


def images() -> list[str]:
    found = [
        inner["image"]
        for path in YAMLS
        for d in documents(path)
        for inner in walk(d)
        if "image" in inner
    ]
    assert len(found) > 6
    return found


def test_versions_are_those_that_were_tested() -> None:
    pins = constraints()
    assert pins["ray"] == ray.__version__
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    tags = {"orchestrator": f"{version[1]}-ray{pins['ray']}", "orchestrator-mlflow": pins["mlflow"]}
    texts = [path.read_text() for path in [*DOCKERFILES, INFRA / "README.md"]]
    built = [image for text in texts for image in re.findall(r"registry\.example\.com/\S+", text)]
    for image in [*images(), *built]:
        name, _, tag = image.rpartition(":")
        assert re.match(r"\d+\.\d+", tag), image
        if name.startswith("registry.example.com/"):
            assert tag == tags[name.removeprefix("registry.example.com/")], image
    said = [inner["rayVersion"] for _, o in OBJECTS for inner in walk(o) if "rayVersion" in inner]
    assert said and set(said) == {pins["ray"]}
    # What the images install by name has a pin too.
    asked = {"boto3", "flask-wtf", "psycopg", "psycopg-binary", "nvidia-ml-py", "torch", "mlflow"}
    assert asked <= set(pins)


SECRET_NAME = re.compile(r"TOKEN$|SECRET|PASSWORD|API_?KEY|ACCESS_KEY", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"(?:TOKEN|PASSWORD|SECRET)=[A-Za-z0-9]|hf_[A-Za-z0-9]{16}|AKIA[A-Z0-9]{16}|-----BEGIN|://[^/\s:@]+:[^/\s:@{$]+@|\b[0-9a-f]{32,}\b"
)


def literal_secrets(document: Any) -> list[str]:
    """Names of secrets that stand there with a value of their own."""
    bad = []
    for inner in walk(document):
        pairs = [(str(key), value) for key, value in inner.items()]
        if "name" in inner and "value" in inner:
            pairs.append((str(inner["name"]), inner["value"]))
        bad += [
            key
            for key, value in pairs
            if SECRET_NAME.search(key)
            and isinstance(value, str)
            and value
            and not re.fullmatch(r"\$\{\w+:\?.*\}", value)
            and key != "secretName"
            # A file's place is no secret.
            and not key.startswith("/")
        ]
    return bad


def test_no_secret_stands_in_a_file() -> None:
    files = [p for p in INFRA.rglob("*") if p.is_file() and p.name not in (".env", "crds.json")]
    for path in [*files, ROOT / "cluster.yaml"]:
        assert not SECRET_VALUE.search(path.read_text()), path
    for path in YAMLS:
        for document in documents(path):
            assert literal_secrets(document) == [], path
            assert document.get("kind") != "Secret"
    assert literal_secrets({"env": [{"name": "PGPASSWORD", "value": "swordfish"}]}) == [
        "PGPASSWORD"
    ]
    assert literal_secrets({"POSTGRES_PASSWORD": "swordfish"}) == ["POSTGRES_PASSWORD"]


def test_every_secret_is_named_in_the_readme() -> None:
    names = [i["secretKeyRef"]["name"] for _, o in OBJECTS for i in walk(o) if "secretKeyRef" in i]
    names += [i["secretRef"]["name"] for _, o in OBJECTS for i in walk(o) if "secretRef" in i]
    (compose,) = documents(COMPOSE)
    names += re.findall(r"\$\{(\w+):\?", json.dumps(compose))
    readme = (INFRA / "README.md").read_text()
    assert names and [name for name in {*names, "ray-token"} if name not in readme] == []


def rays_metrics() -> set[str]:
    """Names that the installed Ray gives to its metrics, read from its source."""
    folder = Path(ray.__file__).parent
    sources = [folder / "dashboard/modules/reporter/reporter_agent.py"]
    sources += (folder / "train/v2/_internal/metrics").glob("*.py")
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(f"ray_{node.value}")
    return found


def metrics_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads; raises where it is none."""
    found: set[str] = set()

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(str(node.name))
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def dashboard() -> dict[str, Any]:
    return json.loads((INFRA / "monitoring" / "dashboard.json").read_text())


def test_the_dashboard_and_the_rules_read_metrics_that_exist() -> None:
    panels = dashboard()["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    (rules,) = documents(INFRA / "monitoring" / "rules.yaml")
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    assert len(panels) > 6 and len(alerts) > 2
    known = OURS | rays_metrics()
    read = set()
    for expression in expressions + alerts:
        names = metrics_in(expression)
        assert names and names <= known, expression
        read |= names
    assert read >= OURS, "a metric of ours is shown nowhere"
    assert metrics_in('max by (run) (ray_orchestrator_los{run=~"$run"})') - known


def test_the_dashboard_asks_for_the_variables_it_has() -> None:
    board = dashboard()
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]+)", json.dumps(board))) - {"__all"} == variables
    assert all(panel["datasource"]["uid"] == "${source}" for panel in board["panels"])
    identities = [panel["id"] for panel in board["panels"]]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(identities)) == len(set(places)) == len(board["panels"])


def test_prometheus_finds_rays_nodes_and_the_rules() -> None:
    (prometheus,) = documents(INFRA / "monitoring" / "prometheus.yaml")
    (scrape,) = prometheus["scrape_configs"]
    (discovery,) = scrape["file_sd_configs"]
    assert discovery["files"] == [f"/tmp/ray/{ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    (rules,) = documents(INFRA / "monitoring" / "rules.yaml")
    assert prometheus["rule_files"] == ["rules.yaml"]
    monitor, operators = documents(INFRA / "monitoring" / "kubernetes.yaml")
    assert operators["spec"] == rules
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    containers = [
        container
        for _, found in OBJECTS
        if found["kind"] in ("RayCluster", "RayJob")
        for spec in pod_specs(found)
        for container in spec["containers"]
        if container["name"].startswith("ray-")
    ]
    assert len(containers) == 4
    for container in containers:
        assert endpoint["port"] in {port["name"] for port in container["ports"]}
