"""The frozen base, the adapters over it, attention within segments, and the loss.

Knows nothing of tokenization, data sets, Ray or MLflow.
"""
