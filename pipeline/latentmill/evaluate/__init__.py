"""Measurements of a store and its model: error at the seams of chunks, linearity."""
