"""The background process: a child of the trainer that hashes, writes and publishes what the trainer has staged."""
