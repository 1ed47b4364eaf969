"""Audio sources: where items come from."""
