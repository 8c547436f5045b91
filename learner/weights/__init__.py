"""Weights out of the learner: snapshots, broadcasts, export, LoRA adapters."""
