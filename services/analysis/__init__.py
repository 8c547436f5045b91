"""Status, report, matrix and charts of a run directory. Reads records; imports no code that runs a training."""
