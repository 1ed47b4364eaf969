"""A whole run, from a config to a sealed store."""
