"""The training state: live objects ↔ named tensors and plain trees; copies no tensor."""
