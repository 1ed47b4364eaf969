"""Exporting stores to the formats of other tools."""
