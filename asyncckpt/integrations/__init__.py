"""Edges: where events and checkpoints meet other tools. Each module imports its tool only when it is used."""
