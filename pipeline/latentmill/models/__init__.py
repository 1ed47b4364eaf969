"""Autoencoders behind one protocol, which `base` defines; `registry` finds a model by name."""
