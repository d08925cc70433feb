"""Lossless packing of encoded tensors: byte planes, masks, and an entropy coder from a library."""

from shrink.coders.packing import pack

__all__ = ["pack"]
