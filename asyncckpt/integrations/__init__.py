"""Integrations connect events and checkpoints to other tools. Each module imports its tool only when it is used."""
