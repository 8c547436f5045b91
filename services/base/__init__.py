"""Errors, files, signals. May import nothing else of the services."""
