"""The small synthesised corpus of `latentmill demo`."""
