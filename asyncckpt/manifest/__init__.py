"""The manifest is what a checkpoint records: this package has it as text, as records, and as the draft of a save."""
