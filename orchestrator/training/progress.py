"""What a run has done so far, carried from checkpoint to checkpoint."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Sums over the whole run, whatever died in it.

    seconds: time spent in training steps. train_loss: the last step's.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    initial_eval_loss: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    reports: tuple[dict[str, Any], ...] = ()
    """What a sweep was told at each evaluation after the first step."""

    def stepped(self, loss: float, tokens: int, seconds: float) -> "Progress":
        """After one more optimizer step."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            seconds=self.seconds + seconds,
            train_loss=loss,
        )

    def evaluated(self, loss: float) -> "Progress":
        """After an evaluation at the present step."""
        now = replace(self, eval_loss=loss, eval_step=self.step)
        if self.step == 0:
            now = replace(now, initial_eval_loss=loss)
        if self.best_eval_loss is None or loss < self.best_eval_loss:
            now = replace(now, best_eval_loss=loss, best_step=self.step)
        return now

    def reported(self, done: bool) -> "Progress":
        """With one more report for whoever decides how the run goes on."""
        report = {
            "step": self.step,
            "done": done,
            "eval_loss": self.eval_loss,
            "perplexity": None if self.eval_loss is None else perplexity(self.eval_loss),
            "train_loss": self.train_loss,
            "tokens_per_second": self.tokens_per_second,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        return replace(self, reports=(*self.reports, report))

    @property
    def tokens_per_second(self) -> float | None:
        """Over training steps alone: evaluation, checkpoints and start-up are not in it."""
        return self.tokens / self.seconds if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        """As plain json values."""
        return asdict(self)


def perplexity(eval_loss: float) -> float:
    """The exponential of a loss in nats; infinite where a float cannot hold it."""
    try:
        return math.exp(eval_loss)
    except OverflowError:
        return math.inf
