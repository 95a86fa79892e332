"""Digests of tensors where they live, to tell later whether they have changed."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash

from asyncckpt.memory.tensor_bytes import _copy_strided, is_plain

#: Python digests so much without giving the interpreter up, which xxhash does: beside a thread that is bound by Python,
#: each of thousands of small tensors would wait 5 ms to get it back.
_SMALL_BYTES = 16 << 10
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


@dataclass(slots=True)  # not frozen: a save makes some of these on the training thread, which takes three times as long
class LiveTensor:
    """``LiveTensor`` finds a tensor's memory again later without keeping it alive. ``owner``: an object that keeps the
    memory while training needs it. The other fields say where in the owner's memory block the tensor lies."""

    owner: weakref.ref[torch.Tensor]
    block: int
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    def now(self) -> torch.Tensor | None:
        """Return a view of the memory, which may be the owner itself, or None where the owner is gone or has other
        memory now."""
        owner = self.owner()
        if owner is None:
            return None
        storage = local_part(owner).untyped_storage()
        if storage.data_ptr() != self.block:
            return None
        if (
            type(owner) in _PLAIN
            and owner.storage_offset() == self.offset
            and owner.shape == self.size
            and owner.stride() == self.stride
            and owner.dtype is self.dtype
            and is_plain(owner)
            and self.offset * owner.element_size() + owner.nbytes <= storage.nbytes()
        ):
            # to make a view gives the interpreter up, for which a thread that is bound by Python has to be waited
            return owner
        view = torch.empty(0, dtype=self.dtype, device=storage.device)
        try:
            return view.set_(storage, self.offset, self.size, self.stride)
        except RuntimeError:  # the block is smaller now
            return None


def live(tensor: torch.Tensor, owner: torch.Tensor) -> LiveTensor:
    """Return where ``tensor`` lies in the memory of ``owner``, which may be the tensor itself."""
    return LiveTensor(
        weakref.ref(owner),
        tensor.untyped_storage().data_ptr(),
        tensor.dtype,
        int(tensor.storage_offset()),
        tensor.shape,
        tensor.stride(),
    )


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a DTensor that is here; any other tensor as it is."""
    part: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def version_of(tensor: torch.Tensor) -> int:
    """Return torch's count of in-place changes of the tensor; 0 for an inference tensor, which has none."""
    try:
        return int(tensor._version)
    except RuntimeError:
        return 0


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return ``version_of`` each of the tensors. A state has thousands, and this runs on the training thread."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [version_of(tensor) for tensor in tensors]


def digest_of(tensor: torch.Tensor, begin: int, nbytes: int) -> int:
    """Digest ``nbytes`` of a CPU tensor's row-major bytes from ``begin`` on; both are multiples of its item's size.
    Blocks; copies no more than these bytes."""
    if is_plain(tensor):
        return digest_at(tensor.data_ptr() + begin, nbytes)
    item = tensor.element_size()
    part = torch.empty(nbytes // item, dtype=tensor.dtype, device="cpu")
    _copy_strided(tensor.detach(), begin // item, (begin + nbytes) // item, part)
    return digest_of_image(part.view(torch.uint8).numpy().data)


def digest_at(address: int, nbytes: int) -> int:
    """Digest ``nbytes`` of this process's memory from ``address`` on, which must be readable. Its digests are of use in
    this process alone."""
    if nbytes <= _SMALL_BYTES:
        return hash(ctypes.string_at(address, nbytes))
    return xxhash.xxh3_128_intdigest((ctypes.c_char * nbytes).from_address(address))


def digest_of_image(image: memoryview) -> int:
    """Digest the bytes of a contiguous view, as ``digest_at`` does."""
    return hash(bytes(image)) if image.nbytes <= _SMALL_BYTES else xxhash.xxh3_128_intdigest(image)


_WIDTH = 1024


def device_checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return a checksum of a dense tensor's bytes: two int64, computed on its device in order with what is enqueued
    there, without waiting for it. Bytes are weighted by their place, so that exchanged values change it, too."""
    flat = torch.as_strided(tensor.detach(), (tensor.numel(),), (1,)).view(torch.uint8)
    words = flat.view(torch.int32) if flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0 else flat
    even = len(words) // _WIDTH * _WIDTH
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    if even:
        rows = words[:even].view(-1, _WIDTH)
        by_row, by_column = rows.sum(1, dtype=torch.int64), rows.sum(0, dtype=torch.int64)
        total[0] += (by_row * _weights(len(by_row), tensor.device)).sum()
        total[1] += (by_column * _weights(_WIDTH, tensor.device)).sum()
    rest = words[even:].to(torch.int64)
    total[0] += (rest * _weights(len(rest), tensor.device)).sum() * 31
    return total


def _weights(count: int, device: torch.device) -> torch.Tensor:
    return _arange(1 << max(0, count - 1).bit_length(), device)[:count]


@functools.lru_cache(maxsize=64)
def _arange(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(1, 2 * count, 2, dtype=torch.int64, device=device) * 0x9E3779B97F4A7C1 + 1
