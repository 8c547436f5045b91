"""The configuration of a run: sections, loading, sentences for mistakes. Imports base only; no torch, ray or vllm."""
