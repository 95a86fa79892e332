"""How light saves are on the trainer: what they take of its time and of its interpreter, at any tensor count."""
