"""Algorithms: how records become training sequences, one file each. Imports base, the wire types and the losses."""
