"""EC2 instances for Ray's launcher and autoscaler: spot, or on demand where there is no spot."""

from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

_MARKET = "InstanceMarketOptions"


class SpotFirst(AWSNodeProvider):  # type: ignore[misc]
    """Ray's own provider, with a second try on demand for what EC2 does not give as spot.

    Ray's autoscaler (2.60) would ask for the refused type again and again: it turns to one of lower
    priority only where an instance came and did not start. EC2 may give some of those asked for.
    """

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        """Create up to `count` instances, by their ids.

        Raises:
            NodeLaunchException: EC2 refuses them on demand too, in every zone.
        """
        if _MARKET not in node_config:
            return dict(super().create_node(node_config, tags, count))
        try:
            made = dict(super().create_node(node_config, tags, count))
        except NodeLaunchException:
            made = {}
        if len(made) >= count:
            return made
        on_demand = {key: value for key, value in node_config.items() if key != _MARKET}
        try:
            return {**made, **super().create_node(on_demand, tags, count - len(made))}
        except NodeLaunchException:
            if not made:
                raise
            # Some came as spot; the autoscaler asks for the others again.
            return made
