"""Figures of a machine with GPUs, at shapes that people train. Each file measures one row of docs/benchmarks.md.

learner.py   a learner step               update.py    weights, from published to verified
engines.py   decoding and scoring         training.py  whole steps, strict and one step ahead
all.py       all of these, and benchmarks.peer

Models are random and made at the start. With `--device cpu --shape tiny` each runs without a GPU.
"""
