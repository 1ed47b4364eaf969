"""The only modules that import ray: cluster, actors, scheduler; and the progress of a run."""
