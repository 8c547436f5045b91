"""Demonstrations that an application sends while a service runs: kept on the disk, each once. Imports base only."""
