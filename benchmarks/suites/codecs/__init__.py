"""Codecs are measured chunk by chunk: ratio and speed on states that were really trained, beside other compressors."""
