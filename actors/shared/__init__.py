"""Code shared by actors, learner and services: wire types, process set-up, groups, adapters, waits."""
