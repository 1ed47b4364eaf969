"""Audio to latents: chunks, batches, stitching."""
