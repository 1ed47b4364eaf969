"""Curating stores: subsets, splits, merged stores, annotations and queries."""
