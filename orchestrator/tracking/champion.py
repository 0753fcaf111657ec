"""Who is champion. A decision, not an action."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Decision(Enum):
    """What happens to the alias."""

    PROMOTE = "promote"
    KEEP = "keep"


@dataclass(frozen=True)
class Version:
    """A registered version and what it reached on held-out data."""

    number: str
    eval_loss: float | None


def decide(candidate: Version, champion: Version | None) -> Decision:
    """Whether a version takes the alias: it must be the first, or strictly better.

    Args:
        candidate: the new version; without an eval loss, or with NaN, it beats nobody.
        champion: who holds the alias; without an eval loss any finite one beats it.
    """
    if champion is None:
        return Decision.PROMOTE
    if champion.number == candidate.number:
        return Decision.KEEP
    better = _comparable(candidate.eval_loss) < _comparable(champion.eval_loss)
    return Decision.PROMOTE if better else Decision.KEEP


def successor(champion: Version | None, contenders: Iterable[Version]) -> Version | None:
    """Who holds the alias once it was decided on each contender, one after the other."""
    for contender in contenders:
        if decide(contender, champion) is Decision.PROMOTE:
            champion = contender
    return champion


def _comparable(eval_loss: float | None) -> float:
    return math.inf if eval_loss is None or math.isnan(eval_loss) else eval_loss
