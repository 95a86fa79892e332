"""A codec turns the bytes of one chunk into a frame and back, without loss. Codecs are known by name, and zarr's own
codecs read their frames."""

from __future__ import annotations

from asyncckpt.codecs.codecs import Auto, Blosc, Lz4, Planes, Raw, Zstd

__all__ = ["Auto", "Blosc", "Lz4", "Planes", "Raw", "Zstd"]
