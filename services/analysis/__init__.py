"""Status, report, matrix and charts of a run directory. Reads records; imports nothing that runs."""
