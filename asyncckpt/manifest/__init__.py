"""The manifest: what a checkpoint records, as text and as records, and the draft of it that a save carries."""
