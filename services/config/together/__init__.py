"""What the sections of a run's configuration must be together. Each file checks one part of it.

A file has `check(run)`, which raises ValueError. Imports the sections and what they import; run.py calls the checks.
"""
