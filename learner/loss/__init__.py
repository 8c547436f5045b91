"""The divergence between teacher and student, chunk by chunk. Plain torch."""
