"""The student model: packed sequences, attention, log-probs. transformers and torch."""
