"""Audio sources: they list the items of a folder, a manifest, tars or tables."""
