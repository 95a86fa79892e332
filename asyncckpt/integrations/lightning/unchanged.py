"""Lightning saves one step twice, with ``save_last=True``: as the checkpoint, and as the last one. This tells that a
state is the one that was just saved, without reading it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from asyncckpt.state.dtensor import is_distributed

#: ``ModelCheckpoint`` notes here where it saves the last one, between the two saves. Its ``save_last="link"`` leaves
#: it out of both, too.
_NOTE: Final = "last_model_path"
#: The component that has what others than the model and the optimizers keep: a position in data is made anew each time.
_REST: Final = "lightning"
_SMALL_BYTES: Final = 1 << 16


def fingerprint(components: Mapping[str, Any]) -> Any:
    """Return what equals the fingerprint of a later state only if that has the same values: equal plain values, and
    tensors of the same memory that no operation has written to since. Reads no weights, and keeps no memory alive."""
    return [(name, _mark(value, small=name == _REST)) for name, value in components.items()]


def _mark(value: Any, *, small: bool) -> Any:
    """``small``: whether small tensors of the CPU are read, so that they equal others of the same values."""
    if type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_inference():
        layout = (value.storage_offset(), value.shape, value.stride(), value.dtype)
        if small and value.device.type == "cpu" and value.nbytes <= _SMALL_BYTES:
            return (layout, value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        memory: Any = StorageWeakRef  # while one is alive, no other memory gets the same mark
        return (memory(value.untyped_storage()), layout, value._version)
    if is_distributed(value):  # torch counts changes of the whole; this rank's part is what has them
        return (value._version, _mark(value._local_tensor.detach(), small=small))
    if isinstance(value, dict):
        return [(type(key), key, _mark(one, small=small)) for key, one in value.items() if key != _NOTE]
    if isinstance(value, list | tuple):
        return [type(value), *(_mark(one, small=small) for one in value)]
    if value is None or isinstance(value, bool | int | float | str | bytes | type):
        return (type(value), value)
    return object()  # what is not known here equals nothing
