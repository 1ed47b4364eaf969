"""Pictures (PNG) and players (Opus) of sounds and latents, for pages and notebooks."""
