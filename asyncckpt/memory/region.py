"""A region is a stretch of staging memory that is mapped at once: anonymous memory, or shared with another process.

Shared regions are files in memory (``memfd_create``) that have no name anywhere: whoever is to map one gets its
descriptor. They take no room of ``/dev/shm``, and are gone with the last process that has them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from asyncckpt import forks
from asyncckpt.loaded_torch import loaded_torch
from asyncckpt.memory import cuda
from asyncckpt.memory.buffers import _in_huge_pages

if TYPE_CHECKING:
    import torch

log = logging.getLogger("asyncckpt")

_MADV_POPULATE_READ = 22  # needs Linux 5.14, as the next one does
_MADV_POPULATE_WRITE = 23
#: Linux lists a process's descriptors here.
_DESCRIPTORS = "/proc/self/fd"
#: A kernel or file system that cannot set memory aside in advance answers this: the pages come when they are touched.
_NO_FALLOCATE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
#: Shared memory is set aside in large steps: then more of its pages are neighbours, and a device takes them in fewer
#: parts. The system gives most of it in small pages (docs/design/021-background-process.md).
_SET_ASIDE_BYTES = 256 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


class _Memory(mmap.mmap):
    """``_Memory`` is staging memory that a fork neither copies nor inherits: it has gigabytes, and training forks data
    loader workers."""

    #: What Linux calls the file that the memory is shared by; empty where it is not shared.
    shared_as = ""

    def __init__(self, *_: object, **__: object) -> None:
        forks.disarm_in_child(self)
        self.madvise(mmap.MADV_DONTFORK)

    def disarm(self) -> None:
        """Never free this object in a forked child, and let go of the memory that it was shared by."""
        # in the child something else may lie at these addresses by the time this object is freed, which would unmap
        # that: so it is never freed there
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        if self.shared_as:  # the object has a descriptor of its own, which it never closes here
            for fd in os.listdir(_DESCRIPTORS):
                with contextlib.suppress(OSError):
                    if self.shared_as in os.readlink(f"{_DESCRIPTORS}/{fd}"):
                        os.close(int(fd))


class Region:
    """Maps ``nbytes`` of staging memory. ``shared``: another process can map it, too, by the descriptor ``fd``, which
    is -1 otherwise. Raises ``OSError`` and ``MemoryError`` where the system gives none."""

    def __init__(self, nbytes: int, *, shared: bool = False) -> None:
        self.nbytes = nbytes
        self.fd = -1
        #: So many bytes from the beginning of a shared region are there.
        self._set_aside = 0
        if shared:
            name = f"asyncckpt-{uuid.uuid4().hex}"
            self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
            forks.finalize(self, os.close, self.fd)
            os.ftruncate(self.fd, nbytes)
            self.memory = _Memory(self.fd, nbytes, flags=mmap.MAP_SHARED)
            self.memory.shared_as = name
        else:
            self.memory = _Memory(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _in_huge_pages(self.memory)
        self.view = memoryview(self.memory)
        self.address = address_of(self.view)

    def fault_in(self, offset: int, nbytes: int) -> bool:
        """Have the system provide these bytes now. Blocks. Returns False where it has no memory for a shared region;
        for any other, the system ends the process then."""
        while self.fd >= 0 and self._set_aside < offset + nbytes:
            step = min(_SET_ASIDE_BYTES, self.nbytes - self._set_aside)
            if not self._can_set_aside(self._set_aside, step):
                return False
            self._set_aside += step
        if _libc.madvise(self.address + offset, nbytes, _MADV_POPULATE_WRITE) != 0:
            _libc.memset(self.address + offset, 0, nbytes)
        return True

    def _can_set_aside(self, offset: int, nbytes: int) -> bool:
        """Whether the system gives memory for a part of a shared region: touching what it does not give would be a
        SIGBUS."""
        try:
            os.posix_fallocate(self.fd, offset, nbytes)
        except OSError as error:
            return error.errno in _NO_FALLOCATE
        return True

    def pin(self, device: torch.device) -> None:
        """Register the region with CUDA, so that copies overlap with kernels: those of all devices, though ``device``
        does it. Blocks. Logs where CUDA refuses."""
        runtime: Callable[[], Any] = loaded_torch().cuda.cudart
        with cuda.on(device):
            cudart = runtime()
            code = int(cudart.cudaHostRegister(self.address, self.nbytes, 0))
        if code:
            log.warning(
                "could not pin %d bytes of staging memory (CUDA error %d): copies are slower", self.nbytes, code
            )
            return
        forks.finalize(self, _unpin, cudart, self.address, device)


def _unpin(cudart: Any, address: int, device: torch.device) -> None:
    with cuda.on(device):
        cudart.cudaHostUnregister(address)


def can_share() -> bool:
    """Return whether this system has memory that can be shared by descriptor (Linux has)."""
    return hasattr(os, "memfd_create") and hasattr(os, "posix_fallocate")


def map_shared(fd: int, nbytes: int) -> memoryview:
    """Map a shared region of another process and return it; it is writable. The descriptor may be closed after it.
    Blocks while the pages are mapped. Raises ``OSError``."""
    memory = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED)
    _in_huge_pages(memory)
    view = memoryview(memory)
    _libc.madvise(address_of(view), nbytes, _MADV_POPULATE_READ)  # else each page costs a fault when it is first read
    return view


def address_of(view: memoryview) -> int:
    """Return the address of the first byte of writable memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
