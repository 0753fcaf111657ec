"""Ray Tune's schedulers, with a memory.

Tune keeps its trials and its searcher across kills, but no scheduler (2.60): ASHA's rungs would be
empty, and whoever comes first would pass them all.
"""

from pathlib import Path
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, PopulationBasedTraining

from orchestrator.tracking.journal import Journal, read_events

_HEARD = "heard"


class Memory:
    """What a scheduler heard of each trial, in a file."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier command has written there."""
        self._path = path
        # Opened late: Tune copies its schedulers before it begins.
        self._journal: Journal | None = None
        self._heard: dict[str, list[tuple[int, float]]] = {}
        for event, _ in read_events(path) if path.exists() else ():
            self._keep(event["trial"], event["step"], event["value"])

    def add(self, trial: Any, step: int, value: float) -> None:
        """Of one evaluation, before anything is decided by it."""
        if self._journal is None:
            self._journal = Journal(self._path)
        self._journal.append(_HEARD, trial=trial.trial_id, step=step, value=value)
        self._keep(trial.trial_id, step, value)

    def of(self, trial: Any) -> list[tuple[int, float]]:
        """Steps and values that Tune knows of too; what came later is said, and judged, again."""
        known = (trial.last_result or {}).get("step", 0)
        return [
            (step, value) for step, value in self._heard.get(trial.trial_id, ()) if step <= known
        ]

    def _keep(self, trial_id: str, step: int, value: float) -> None:
        self._heard.setdefault(trial_id, []).append((step, value))


class _Hearing:
    """Mixed into a scheduler of Tune's: it remembers before it decides."""

    def __init__(self, memory: Memory, **settings: Any) -> None:
        super().__init__(**settings)
        self._memory = memory

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether the trial goes on."""
        self._hear(trial, result)
        return str(super().on_trial_result(tune_controller, trial, result))  # type: ignore[misc]

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The trial is at its end."""
        self._hear(trial, result)
        super().on_trial_complete(tune_controller, trial, result)  # type: ignore[misc]

    def _hear(self, trial: Any, result: dict[str, Any]) -> None:
        step, value = result.get(self._time_attr), result.get(self._metric)  # type: ignore[attr-defined]
        if step is not None and value is not None:
            self._memory.add(trial, step, value)


class Asha(_Hearing, AsyncHyperBandScheduler):  # type: ignore[misc]
    """Asynchronous successive halving whose rungs survive a kill."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Put what the trial had reached into the rungs."""
        super().on_trial_add(tune_controller, trial)
        for step, value in self._memory.of(trial):
            self._trial_info[trial.trial_id].on_result(trial, step, self._metric_op * value)


class Population(_Hearing, PopulationBasedTraining):  # type: ignore[misc]
    """Population based training that knows after a kill how good its trials were."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Compare others with what the trial had reached."""
        super().on_trial_add(tune_controller, trial)
        heard = self._memory.of(trial)
        if heard:
            step, value = heard[-1]
            state = self._trial_state[trial]
            state.last_score = self._metric_op * value
            state.last_train_time = state.last_perturbation_time = step
            state.last_result, state.last_checkpoint = trial.last_result, trial.checkpoint
