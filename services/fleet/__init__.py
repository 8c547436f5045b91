"""Pools of engines: supervision, dispatch, snapshots, broadcasts, scaling. Imports cluster and below."""
