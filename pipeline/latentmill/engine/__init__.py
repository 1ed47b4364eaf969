"""Runs units on Ray: cluster connection, actors, scheduler; and shows the progress of a run.

Outside this package, only `training/job.py` imports ray.
"""
