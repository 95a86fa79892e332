"""The suites of ``python -m benchmarks``: engine and restore, drag, codecs, ranks."""
