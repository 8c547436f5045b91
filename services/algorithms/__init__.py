"""Training methods: sampler, scorer and loss of each. Imports config."""
