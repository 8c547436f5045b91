"""What a user starts: configuration, command line, training loop, evaluation, report."""
