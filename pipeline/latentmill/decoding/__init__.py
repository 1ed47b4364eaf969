"""Latents to audio."""
