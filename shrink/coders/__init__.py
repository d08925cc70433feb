"""Lossless packing of an encoded tensor's bytes."""

from shrink.coders.zstd import pack

__all__ = ["pack"]
