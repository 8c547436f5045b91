"""The Ray cluster: connection, nodes, placement, job submission. Imports planning and below."""
