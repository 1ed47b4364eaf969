"""The only modules that import ray: cluster, actors and scheduler. Also the progress of a run."""
