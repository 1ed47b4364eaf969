"""Curation of stores: metadata, queries and neighbours of their records."""
