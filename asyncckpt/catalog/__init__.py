"""The catalog knows which checkpoints a run has, what they are called, and which to keep."""
