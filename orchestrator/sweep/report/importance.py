"""How much each searched key mattered, by Optuna, from what the trials came to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.sweep.outcome import Outcome
from orchestrator.sweep.report.dimension import Dimension
from orchestrator.training.progress import perplexity

# Of Optuna's random forest, so that the same trials give the same figures.
_SEED = 0
_NO_STEP = -1


@dataclass(frozen=True)
class Importance:
    """Shares of the metric's variance, by key; they sum to 1.

    step: where the trials were compared: the last evaluation that all of them reached; None for a
    metric that is not of a step.
    """

    shares: dict[str, float]
    step: int | None
    trials: int


def importance(
    dimensions: Sequence[Dimension], found: Sequence[Outcome], metric: str
) -> Importance | None:
    """Functional ANOVA over all trials that were evaluated, stopped ones too.

    Trials are compared at the last step that all of them reached: a trial that was stopped early
    has a worse loss for having trained less, not for its values alone.

    Source: Hutter et al. 2014, "An Efficient Approach for Assessing Hyperparameter Importance",
    as `optuna.importance.FanovaImportanceEvaluator` has it.

    Returns:
        None where nothing can be compared: fewer than two trials, one value of every key, or
        the same loss everywhere.
    """
    curves = {place: _curve(outcome, metric) for place, outcome in enumerate(found)}
    curves = {place: curve for place, curve in curves.items() if curve}
    common = set.intersection(*map(set, curves.values())) if curves else set()
    if not common:
        return None
    step = max(common)
    values = {place: curve[step] for place, curve in curves.items()}
    varied = [d for d in dimensions if len({d.values[place] for place in values}) > 1]
    if len(values) < 2 or len(set(values.values())) < 2 or not varied:
        return None
    shares = {d.key: 0.0 for d in dimensions} | _fanova(varied, values)
    ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
    return Importance(ordered, step if step != _NO_STEP else None, len(values))


def _curve(outcome: Outcome, metric: str) -> dict[int, float]:
    """The trial's finite metric by step; empty for one that failed."""
    if outcome.status == "failed":
        return {}
    if metric == "tokens_per_second":
        rate = outcome.tokens_per_second
        return {} if rate is None else {_NO_STEP: rate}
    points = outcome.losses if metric == "train_loss" else outcome.evaluations
    change = perplexity if metric == "perplexity" else float
    values = {step: change(loss) for step, loss in points if step > 0}
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _fanova(varied: Sequence[Dimension], values: dict[int, float]) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {d.key: _distribution(d, list(values)) for d in varied}
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={d.key: d.values[place] for d in varied},
                distributions=distributions,
                value=value,
            )
            for place, value in values.items()
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=_SEED)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _distribution(dimension: Dimension, places: Sequence[int]) -> Any:
    """Over the values that were tried: points and mutations may lie outside the search space."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    values = [dimension.values[place] for place in places]
    if not dimension.numeric:
        return CategoricalDistribution(list(dict.fromkeys(values)))
    whole = all(isinstance(value, int) for value in values)
    kind = IntDistribution if whole else FloatDistribution
    return kind(min(values), max(values), log=dimension.log)
