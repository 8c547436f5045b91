"""Training methods: who samples, who scores, which loss. Imports config."""
