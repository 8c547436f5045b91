"""Reporting of a live run: log, sinks, Prometheus, console, watchdog. Imports records and below."""
