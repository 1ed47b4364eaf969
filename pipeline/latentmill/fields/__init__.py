"""Fields of a store: what their values are computed from, and which are out of date."""
