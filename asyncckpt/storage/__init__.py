"""Storage backends: bytes in, bytes out, durability. Nothing here knows what a tensor is."""
