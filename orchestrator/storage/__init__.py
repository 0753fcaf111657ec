"""Where a run lies: a folder that all machines share, or a URI of an object store.

Runs always work in a local folder; under a URI that folder mirrors what the store has.
"""
