"""The training loop: when to save, what waits for a save, and how the loop ends."""
