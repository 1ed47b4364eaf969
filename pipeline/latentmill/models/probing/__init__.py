"""Measures what models do with audio: for `latentmill probe`, and for models without a known spec.

`lengths.py`, `context.py` and `behaviour.py` measure any function that encodes; `encoding.py` and
`decoding.py` compare a loaded model with its spec, one check for each claim, and `examination.py`
runs the checks.
"""
