"""Restoring: live objects get the values of a checkpoint, in place."""
