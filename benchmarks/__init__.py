"""Benchmarks of the engine against the device and against its peers: ``python -m benchmarks --help``."""
