"""Simulated engines, learner and time for tests and benchmarks. The policies are real; no model runs."""
