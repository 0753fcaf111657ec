"""Every error a user can meet, with the exit status it ends the command with.

The classes take one message, so that they survive pickling between Ray processes unchanged.
"""


class OrchestratorError(Exception):
    """A failure the user can act on: the message says what was wrong, where, and what to do."""

    exit_status = 1


class RefusedError(OrchestratorError):
    """The job was refused before any work was done."""

    exit_status = 2


class JobFileError(RefusedError):
    """The job file or a `--set` override is not valid."""


class DataError(RefusedError):
    """The data set cannot be read, or nothing in it can be trained on."""


class ModelError(RefusedError):
    """The base model cannot be loaded, or its architecture is not supported."""


class UnplannableError(RefusedError):
    """What a model takes of memory cannot be foretold; whether it trains is another matter."""


class CheckpointError(OrchestratorError):
    """A checkpoint cannot be written, or none that is left can be read."""


class TrainingError(OrchestratorError):
    """Training cannot go on: a loss that is not finite, or no step was trained."""


class ProofError(OrchestratorError):
    """The saved adapter does not reproduce the trained model."""


class InterruptedRunError(OrchestratorError):
    """The user stopped the run; a checkpoint was written and the same command goes on."""

    exit_status = 130


class WorkerLostError(Exception):
    """Another worker died or hangs: the run starts again from its last checkpoint.

    No `OrchestratorError`, for there is nothing that the user could mend.
    """


def status_word(exit_status: int) -> str:
    """How a command ended that did not finish: `refused`, `interrupted` or `failed`."""
    return {2: "refused", 130: "interrupted"}.get(exit_status, "failed")


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's message; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """As `first_line`; Ray puts a process's whole traceback before the error's own words."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
