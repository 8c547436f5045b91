"""Evaluation sets on engines, files of replies, lm-eval. Imports fleet and below."""
