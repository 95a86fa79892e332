"""``python -m benchmarks --help``: benchmarks compare the engine with the device and with its peers."""
