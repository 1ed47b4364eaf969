"""Copying a store to another storage, and publishing it on the Hugging Face hub."""
