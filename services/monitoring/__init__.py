"""What a live run tells: its log, sinks, Prometheus, the console, the watchdog. Imports records and below."""
