"""The demo: a small corpus of its own, and what `latentmill demo` does with it."""
