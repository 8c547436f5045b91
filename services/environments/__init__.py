"""Environments: what answers a student's turns, such as tools. Each runs in processes of its own.

    record ─► reset ─► reply of the student ─► step ─► messages ─► next reply ─► ... ─► Done

Imports data, algorithms, config and base. The process of an environment (`process.py`) imports none of them, so that it
starts quickly.
"""
