"""The training loop: this package decides when to save, what waits for a save, and how the loop ends."""
