"""Torch datasets over stores of latents: crops, masks, mixing, ranks, resumable state."""
