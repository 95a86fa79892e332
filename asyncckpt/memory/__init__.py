"""Host memory: the arena that extents are staged in, buffers for O_DIRECT, what the system has left."""
