"""Measurements of how good a store and its model are."""
