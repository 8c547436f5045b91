"""Measurements behind the figures in README.md; `make bench` runs them all, alone on the machine."""
