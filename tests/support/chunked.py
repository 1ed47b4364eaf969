"""Encoding one item as a run does it, or in one piece."""

from latentmill.encoding.single import encode_chunked, encode_whole

__all__ = ["encode_chunked", "encode_whole"]
