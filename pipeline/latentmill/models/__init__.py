"""Autoencoders behind one protocol: `base` is the contract, `registry` finds a model by name."""
