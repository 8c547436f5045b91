"""What actors, learner and services share: wire types, process set-up, groups, adapters, waits."""
