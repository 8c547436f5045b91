"""Kernels that only a CPU uses; a reader interested in GPUs may skip them."""
