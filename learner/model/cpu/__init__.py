"""Code that saves time on a CPU. On a GPU, `last_layer` and `norm` apply too."""
