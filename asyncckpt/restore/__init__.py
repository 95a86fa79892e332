"""Restoring: a checkpoint → live objects, in place."""
