"""The journal that every event goes to first, and MLflow, to which it is replayed.

Only this room knows MLflow; it is imported when something is delivered, not before.
"""
