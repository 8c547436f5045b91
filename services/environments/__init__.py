"""Environments: what answers a student's turns, such as tools. Each runs in processes of its own.

    record ─► reset ─► reply of the student ─► step ─► messages ─► next reply ─► ... ─► Done

Imports grading, data, algorithms, config and base. The process of an environment (`process.py`) imports little beside
the class that it runs, so that it starts quickly.
"""
