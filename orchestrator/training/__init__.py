"""The step, the loop around it, and what survives a kill.

Knows neither Ray nor MLflow: the loop emits events and asks whether to stop.
"""
