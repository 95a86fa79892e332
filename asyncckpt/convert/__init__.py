"""Checkpoints are translated from and to other formats here; nothing in the library imports these modules."""
