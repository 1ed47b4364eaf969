"""Training autoencoders: the linearity augmentation, and the loop of jobs/train_linear.py.

from latentmill.training import LinearityAugmentation

linearity = LinearityAugmentation(steps=100_000, seed=0)
for step, audio in enumerate(loader):  # [B, C, T]
    batch = linearity(audio, step)
    latents = batch.latents(encoder(batch.inputs))
    loss = distance(decoder(latents), batch.targets)
"""

from latentmill.training.linearity import LinearityAugmentation, LinearityBatch, LinearitySettings

__all__ = ["LinearityAugmentation", "LinearityBatch", "LinearitySettings"]
