"""Torch datasets over stores: random crops, masks, mixing, distributed reading, resuming."""
