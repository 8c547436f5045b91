"""The student model: packed sequences, attention, log-probs. Imports transformers and torch."""
