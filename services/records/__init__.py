"""Reading and writing the files of a run directory. Imports base, config and algorithms; no torch, ray or vllm."""
