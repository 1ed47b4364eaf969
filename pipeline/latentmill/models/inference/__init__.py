"""How any model is run: device, precision, batches, compilation."""
