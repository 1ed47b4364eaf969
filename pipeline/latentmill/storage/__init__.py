"""Reading and writing files, buckets and URLs."""
