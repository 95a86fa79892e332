"""Staging: tensors → host memory, while training goes on or before ``save`` returns."""
