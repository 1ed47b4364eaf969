"""The model `hf:REPO`: any audio tokenizer of transformers.

There are no special cases for types of models. `network.py` finds the latents before the quantiser,
`measured.py` measures what a configuration does not tell, and `model.py` makes the handle.
"""
