"""The model `hf:REPO`: any audio tokenizer of transformers.

No line depends on a type of model. `network.py` finds the latents before the quantiser,
`measured.py` measures what a configuration does not tell, and `model.py` makes the handle.
"""
