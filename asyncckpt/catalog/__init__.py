"""The catalog: which checkpoints a run has, what they are called, which to keep."""
