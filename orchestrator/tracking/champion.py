"""Who is champion. A decision, not an action."""

import math


def becomes_champion(eval_loss: float | None, champion: float | None) -> bool:
    """Whether a new version takes the alias from the present champion.

    Args:
        eval_loss: the new version's eval loss; None or NaN never wins.
        champion: the present champion's; None or NaN loses to any number.
    """
    if eval_loss is None or math.isnan(eval_loss):
        return False
    if champion is None or math.isnan(champion):
        return True
    return eval_loss < champion
