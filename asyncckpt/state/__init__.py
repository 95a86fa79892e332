"""This package turns live objects into named tensors and trees of plain values, and back; it copies no tensor."""
