"""The learner's state on disk: its pieces, and how they are written while the next step runs."""
