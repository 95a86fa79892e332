"""Reading: verified bytes of a checkpoint, and where they go."""
