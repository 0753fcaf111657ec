"""What the user sees while a run or a sweep goes on: journals, followed and shown.

Live on a terminal, plain lines elsewhere; all on stderr.
"""

from orchestrator.watch.run import watching
from orchestrator.watch.sweep import watching_sweep

__all__ = ["watching", "watching_sweep"]
