"""Measures what models do with audio: for `latentmill probe`, and for models without a known spec.

`lengths.py`, `context.py` and `behaviour.py` measure any function that encodes; `promises.py`
compares a loaded model with its spec.
"""
