"""vLLM engines on Ray that sample student rollouts and score them under the teacher."""
