"""This package manages host memory: the arena that extents are staged in, buffers for O_DIRECT, and what is left."""
