"""The import name of this project: `sdft.services` calls `sdft.learner`, which calls `sdft.actors`."""
