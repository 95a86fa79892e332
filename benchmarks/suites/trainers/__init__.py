"""What saves take of a training inside other libraries' trainers: their own saves and ours, by turns."""
