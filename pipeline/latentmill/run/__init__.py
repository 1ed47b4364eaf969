"""Planning, resuming and executing a whole run, from a config to a sealed store."""
