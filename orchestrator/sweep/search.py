"""Ray Tune's searchers and schedulers, as a job file names them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

from orchestrator.config import LISTED_KINDS, JobConfig, SweepConfig
from orchestrator.sweep.schedulers import Asha, Memory, Population
from orchestrator.sweep.space import PBT_KEY, grid_order, most_steps

# Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", use 4; 3 is milder.
_REDUCTION = 3
# Rungs beyond the trials' real end are never reached.
_ENDLESS = 10**6


def param_space(sweep: SweepConfig) -> dict[str, Any]:
    """The search space in Tune's words."""
    return {key: _domain(sweep, domain) for key, domain in sweep.search_space.items()}


def searcher(sweep: SweepConfig, places: int, known: Callable[[], dict[str, bool]]) -> Any:
    """Who proposes trials.

    Args:
        sweep: of the job.
        places: trials at a time.
        known: whether each trial that Tune knows from an earlier command has ended. Tune writes a
            searcher's state and its own one after the other, and a kill may come between.
    """
    points = [dict(point) for point in sweep.points] or None
    if sweep.searcher != "optuna":
        return _Variants(
            known, points_to_evaluate=points, random_state=sweep.seed, max_concurrent=places
        )
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = OptunaSearch(
        metric=sweep.metric, mode=sweep.mode, points_to_evaluate=points, seed=sweep.seed
    )
    return _Limited(known, found, max_concurrent=places)


class _Variants(BasicVariantGenerator):  # type: ignore[misc]
    """Goes on with the places of the present command, and with Tune's trials, no more, no less."""

    def __init__(self, known: Callable[[], dict[str, bool]], **settings: Any) -> None:
        super().__init__(**settings)
        self._known, self._proposed = known, frozenset[str]()

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what an earlier command has proposed."""
        known = self._known()
        own = {"max_concurrent": self.max_concurrent, "_known": self._known}
        live = _unfinished(state["_live_trials"], known)
        super().set_state({**state, **own, "_live_trials": live, "_proposed": frozenset(known)})

    def next_trial(self) -> Any:
        """The next one that Tune does not have yet."""
        trial = super().next_trial()
        while trial is not None and trial.trial_id in self._proposed:
            trial = super().next_trial()
        return trial


class _Limited(ConcurrencyLimiter):  # type: ignore[misc]
    """As `_Variants`, around a searcher that has no limit of its own."""

    def __init__(self, known: Callable[[], dict[str, bool]], *around: Any, **settings: Any) -> None:
        super().__init__(*around, **settings)
        self._known = known

    def get_state(self) -> dict[str, Any]:
        """What the next command needs."""
        return {name: value for name, value in super().get_state().items() if name != "_known"}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what an earlier command has proposed."""
        live = _unfinished(state["live_trials"], self._known())
        own = {"max_concurrent": self.max_concurrent, "live_trials": live}
        super().set_state({**state, **own, "num_unfinished_live_trials": len(live)})

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Of a trial that it proposed; it may not remember the last one before a kill."""
        if trial_id in self.live_trials:
            super().on_trial_result(trial_id, result)


def _unfinished(live: set[str], known: dict[str, bool]) -> set[str]:
    return {trial for trial in live if known.get(trial) is False}


def scheduler(job: JobConfig, sweep: SweepConfig, memory: Path) -> Any:
    """Who decides which trials go on. Time is the trial's own step: Tune's count restarts.

    Args:
        job: the resolved job.
        sweep: its sweep.
        memory: the file in which the scheduler remembers what it heard.
    """
    total_steps = most_steps(job, sweep) or _ENDLESS
    every = min(job.evaluation.every, total_steps)
    common = {"time_attr": "step", "metric": sweep.metric, "mode": sweep.mode}
    if sweep.scheduler == "asha":
        return Asha(
            Memory(memory),
            **common,
            grace_period=every,
            max_t=total_steps,
            reduction_factor=_REDUCTION,
        )
    if sweep.scheduler == "pbt":
        domain = sweep.search_space[PBT_KEY]
        kind, values = next(iter(domain.items()))
        listed = kind in LISTED_KINDS
        # Of a list Tune takes a neighbour; a range's value it multiplies, beyond the ends too.
        return Population(
            Memory(memory),
            **common,
            perturbation_interval=every,
            hyperparam_mutations={PBT_KEY: list(values) if listed else _domain(sweep, domain)},
            custom_explore_fn=None if listed else partial(_within, *values),
        )
    return FIFOScheduler()


def _within(low: float, high: float, config: dict[str, Any]) -> dict[str, Any]:
    return {**config, PBT_KEY: min(max(config[PBT_KEY], low), high)}


def _domain(sweep: SweepConfig, domain: dict[str, list[Any]]) -> Any:
    kind, values = next(iter(domain.items()))
    if kind in LISTED_KINDS:
        if sweep.searcher != "grid":
            return tune.choice(list(values))
        return tune.grid_search(grid_order(sweep, values))
    low, high = values
    if kind in ("uniform", "loguniform"):
        return getattr(tune, kind)(low, high)
    # Tune leaves the upper end out.
    return (tune.randint if kind == "int" else tune.lograndint)(int(low), int(high) + 1)
