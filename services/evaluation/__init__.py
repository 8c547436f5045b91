"""Evaluation sets on engines, answers, lm-eval. Imports fleet and below."""
