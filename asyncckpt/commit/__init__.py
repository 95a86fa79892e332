"""Committing: files → a published checkpoint, and what follows it."""
