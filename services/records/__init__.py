"""The files of a run directory, read and written. Imports base, config and algorithms; no torch, ray or vllm."""
