"""The vLLM engine. The only package that imports vllm."""
