"""Stores in the formats of other tools."""
