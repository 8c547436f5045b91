"""vLLM engines on Ray: they sample student rollouts and score them under the teacher."""
