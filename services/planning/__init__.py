"""Checks before any process of a run starts: model, memory, plan, fingerprint. Does not import ray."""
