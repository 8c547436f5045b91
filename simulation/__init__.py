"""Simulated engines, learner and time for tests and benchmarks: our policies run, models do not."""
