"""How weights travel from the learner to the engines of a pool: the protocol, and one file for each transport."""
