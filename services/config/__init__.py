"""The configuration of a run: sections, loading, sentences for mistakes. Imports algorithms; no torch, ray or vllm."""
