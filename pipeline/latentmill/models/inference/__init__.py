"""Running any model: device, precision, batches, compilation."""
