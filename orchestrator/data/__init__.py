"""Rows become chats, chats become ids and targets, and those become the batches of a step.

Knows nothing of models beyond their tokenizer.
"""

from orchestrator.data.dataset import EncodedDataset
from orchestrator.data.encoding import Example
from orchestrator.data.prepare import PreparedData, prepare

__all__ = ["EncodedDataset", "Example", "PreparedData", "prepare"]
