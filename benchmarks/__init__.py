"""Benchmarks behind the figures in README.md. `make bench` runs them all, on an otherwise idle machine."""
