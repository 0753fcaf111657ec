"""EC2 instances for the cluster: cluster.yaml as Ray's launcher resolves it, against moto's EC2."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ruamel.yaml import YAML

from orchestrator.cluster.aws import SpotFirst

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"
Asked = list[bool]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    # The launcher makes a key there.
    monkeypatch.setenv("HOME", str(tmp_path))
    with mock_aws():
        for kind in ("head", "node"):
            profile = f"orchestrator-{kind}"
            boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
        yield _bootstrap_config(YAML(typ="safe").load(CLUSTER), no_config_cache=True)


@pytest.fixture
def provider(config: dict[str, Any]) -> Iterator[SpotFirst]:
    found = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    assert isinstance(found, SpotFirst)
    yield found
    # Ray keeps its client of EC2 for the next provider, with what a test has put in its place.
    vars(found.ec2_fail_fast).pop("create_instances", None)


def refuse(provider: SpotFirst, asked: Asked, *markets: bool) -> None:
    """Let EC2 refuse what is spot, or what is not; `asked` hears of each request which it was."""
    create = provider.ec2_fail_fast.create_instances

    def answer(**request: Any) -> Any:
        spot = "InstanceMarketOptions" in request
        asked.append(spot)
        if spot in markets:
            error = {"Code": "InsufficientInstanceCapacity", "Message": "there is none"}
            raise ClientError({"Error": error}, "RunInstances")
        return create(**request)

    provider.ec2_fail_fast.create_instances = answer


def start(provider: SpotFirst, config: dict[str, Any], count: int = 1) -> dict[str, Any]:
    node_config = config["available_node_types"]["gpu"]["node_config"]
    return provider.create_node(node_config, {"ray-node-type": "worker"}, count)


def test_workers_are_spot_instances(provider: SpotFirst, config: dict[str, Any]) -> None:
    asked: Asked = []
    refuse(provider, asked)
    assert len(start(provider, config)) == 1 and asked == [True]


def test_what_ec2_refuses_as_spot_in_every_zone_comes_on_demand(
    provider: SpotFirst, config: dict[str, Any]
) -> None:
    asked: Asked = []
    refuse(provider, asked, True)
    made = start(provider, config)
    assert asked[-1] is False and asked.count(True) >= 3
    assert provider.non_terminated_nodes({"ray-node-type": "worker"}) == list(made)


def test_what_ec2_refuses_on_demand_too_is_told(
    provider: SpotFirst, config: dict[str, Any]
) -> None:
    refuse(provider, [], True, False)
    with pytest.raises(NodeLaunchException):
        start(provider, config)


def test_of_spot_that_is_there_in_part_the_rest_comes_on_demand(
    provider: SpotFirst, config: dict[str, Any]
) -> None:
    asked: Asked = []
    refuse(provider, asked)
    create = provider.ec2_fail_fast.create_instances

    def answer(**request: Any) -> Any:
        # EC2 gives what it has, from the least that was asked for on; moto gives the least.
        there = 1 if "InstanceMarketOptions" in request else request["MaxCount"]
        return create(**{**request, "MinCount": there})

    provider.ec2_fail_fast.create_instances = answer
    made = start(provider, config, 3)
    assert len(made) == 3 and asked == [True, False]
    assert set(provider.non_terminated_nodes({"ray-node-type": "worker"})) == set(made)
