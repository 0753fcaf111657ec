"""Cuts the schemas that `tests/unit/test_infra.py` needs out of published CRDs.

    python infra/schemas/cut.py CRD.yaml... > infra/schemas/crds.json

The CRDs come from the releases that `SOURCES` names. Kept are types, names, patterns and limits;
texts go, and so do pod templates, which Kubernetes' own schema covers. Unknown keys are refused:
a cluster would silently drop them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

SOURCES = {
    "ray.io": "ray-project/kuberay v1.7.0, ray-operator/config/crd/bases",
    "kueue.x-k8s.io": "kubernetes-sigs/kueue v0.19.2, config/components/crd/bases",
    "monitoring.coreos.com": "prometheus-operator/prometheus-operator v0.93.0, "
    "example/prometheus-operator-crd",
}
_KEPT = {"type", "enum", "pattern", "format", "required", "default", "nullable", "maximum"}
_KEPT |= {"minimum", "maxItems", "minItems", "maxLength", "minLength", "anyOf", "oneOf"}


def cut(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without what the tests do not read."""
    kept = {key: value for key, value in schema.items() if key in _KEPT}
    if "(?i)" in kept.get("pattern", ""):
        # Go's flags within a pattern are none of Python's.
        del kept["pattern"]
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    properties = schema.get("properties", {})
    if "containers" in properties.get("spec", {}).get("properties", {}):
        return {"type": "object"}
    if properties:
        kept["properties"] = {name: cut(inner) for name, inner in properties.items()}
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = cut(schema["additionalProperties"])
    if "items" in schema:
        kept["items"] = cut(schema["items"])
    return kept


def main(paths: list[str]) -> None:
    """Print the specs' schemas of all CRDs, as stored, by `group/version/Kind`."""
    found: dict[str, Any] = {}
    for path in paths:
        crd = yaml.safe_load(Path(path).read_text())["spec"]
        version = next(v for v in crd["versions"] if v["storage"])
        schema = version["schema"]["openAPIV3Schema"]
        key = f"{crd['group']}/{version['name']}/{crd['names']['kind']}"
        found[key] = cut(schema["properties"]["spec"])
    lines = [f"{json.dumps(key)}: {json.dumps(found[key])}" for key in sorted(found)]
    print("{\n" + ",\n".join([f'"sources": {json.dumps(SOURCES)}', *lines]) + "\n}")


if __name__ == "__main__":
    main(sys.argv[1:])
