"""Evaluation of a store: its model, its chunking and its contents; results in evaluation/*.json."""
