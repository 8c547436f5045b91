"""The learner's state on disk: which pieces, and how they are written beside the next step."""
