"""A searched key as an axis of a picture: how its values are shown, ordered and spaced. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config import SweepConfig
from orchestrator.sweep.outcome import Outcome
from orchestrator.sweep.words import short_labels, shown

_LOG_KINDS = ("loguniform", "logint")
_CONTINUOUS_KINDS = ("uniform", "loguniform")
_RANGE_KINDS = (*_CONTINUOUS_KINDS, "int", "logint")
# Listed numbers that span this factor, such as ranks 4 to 32, are spaced by their logarithms.
_WIDE = 8


@dataclass(frozen=True)
class Dimension:
    """One searched key over all trials.

    label: the key's last part where that is unambiguous. values: one a trial, in their order;
    numbers, or texts where not all are numbers. listed: the values have no range between them;
    continuous: they may be anywhere in one.
    """

    key: str
    label: str
    values: tuple[Any, ...]
    numeric: bool
    log: bool
    listed: bool
    continuous: bool

    @property
    def levels(self) -> list[Any]:
        """The different values, in order."""
        return sorted(set(self.values)) if self.numeric else list(dict.fromkeys(self.values))

    def places(self) -> list[float]:
        """Where each trial stands on a linear or logarithmic axis: numbers, or texts counted."""
        if self.numeric:
            return [float(value) for value in self.values]
        order = {value: float(place) for place, value in enumerate(self.levels)}
        return [order[value] for value in self.values]


def dimensions(sweep: SweepConfig, found: Sequence[Outcome]) -> list[Dimension]:
    """The searched keys as axes, in the job file's order."""
    keys = tuple(sweep.search_space)
    params = [outcome.params(keys) for outcome in found]
    labels = short_labels(keys)
    return [_dimension(key, labels[key], sweep, [values[key] for values in params]) for key in keys]


def across(found: Sequence[Dimension]) -> tuple[Dimension | None, Dimension | None]:
    """The key that results are drawn over, and the one that colours them.

    Over the learning rate where it is searched as a number; otherwise over the first key that has
    a range, or numbers, or anything.
    """
    varied = [d for d in found if len(d.levels) > 1] or list(found)
    if not varied:
        return None, None
    over = min(
        varied, key=lambda d: (not d.numeric, d.key != "training.learning_rate", not d.continuous)
    )
    return over, next((d for d in varied if d is not over), None)


def _dimension(key: str, label: str, sweep: SweepConfig, values: Sequence[Any]) -> Dimension:
    kind = next(iter(sweep.search_space[key]))
    numeric = all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    listed = kind not in _RANGE_KINDS
    wide = numeric and bool(values) and min(values) > 0 and max(values) >= _WIDE * min(values)
    log = numeric and (kind in _LOG_KINDS or (listed and wide))
    held = tuple(values) if numeric else tuple(shown(value) for value in values)
    log = log and min(values, default=0) > 0
    return Dimension(key, label, held, numeric, log, listed, kind in _CONTINUOUS_KINDS)
