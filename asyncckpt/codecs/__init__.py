"""Codecs: the bytes of one chunk ↔ a frame; lossless, by name, in frames that zarr's own codecs read."""

from __future__ import annotations

from asyncckpt.codecs.codecs import Auto, Blosc, Lz4, Planes, Raw, Zstd

__all__ = ["Auto", "Blosc", "Lz4", "Planes", "Raw", "Zstd"]
