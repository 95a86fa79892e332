"""``python -m benchmarks`` has these suites: engine and restore, drag, codecs, ranks."""
