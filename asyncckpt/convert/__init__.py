"""Checkpoints in other formats, in and out. Edges: they translate, and nothing imports them."""
