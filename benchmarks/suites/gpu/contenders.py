"""Who is measured on the GPU, each set up as its documentation advises."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Final

from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save

from asyncckpt.formats.options import Safetensors
from benchmarks import peers
from benchmarks.harness.state import State
from benchmarks.peers import Saved, Session, in_background
from benchmarks.peers._dcp import DcpSession
from benchmarks.peers.asyncckpt import Asyncckpt

Setup = Callable[[State, str], Session]


class DcpDefault(DcpSession):
    """DCP's ``async_save`` with nothing but defaults: some versions fail with a stager that pins its memory."""

    def __init__(self, state: State, directory: str, kind: AsyncCheckpointerType) -> None:
        super().__init__(state, directory)
        self._kind = kind

    def save(self, step: int) -> Saved:
        began = time.perf_counter()
        written = async_save(self.state_dict(), storage_writer=self.writer(step), async_checkpointer_type=self._kind)
        future = written.upload_completion if isinstance(written, AsyncSaveResponse) else written
        return in_background(began, future, self.path(step))


def _peer(name: str) -> Setup:
    return lambda state, directory: peers.load(name).setup(state, directory)


def _default(kind: AsyncCheckpointerType) -> Setup:
    return lambda state, directory: DcpDefault(state, directory, kind)


#: ``nothing`` is the same window without a save.
NOTHING: Final = "nothing"
CONTENDERS: Final[dict[str, Setup]] = {
    "device": functools.partial(Asyncckpt, watch=False, snapshot="device"),
    "device, threads": functools.partial(Asyncckpt, watch=False, snapshot="device", process="never"),
    "device, watched": functools.partial(Asyncckpt, watch=True, snapshot="device"),
    "device, planes": functools.partial(Asyncckpt, watch=False, snapshot="device", files=Safetensors(codec="planes")),
    "device, zarr": functools.partial(Asyncckpt, watch=False, snapshot="device", files="zarr"),
    "deferred": functools.partial(Asyncckpt, watch=True, snapshot="host"),
    "deferred, planes": functools.partial(Asyncckpt, watch=True, snapshot="host", files=Safetensors(codec="planes")),
    "deferred, zarr": functools.partial(Asyncckpt, watch=True, snapshot="host", files="zarr"),
    "eager": functools.partial(Asyncckpt, watch=False, snapshot="host"),
    "DCP async_save, thread, pinned": _peer("dcp_async_thread"),
    "DCP async_save, process, pinned": _peer("dcp_async_process"),
    "DCP async_save, thread": _default(AsyncCheckpointerType.THREAD),
    "DCP async_save, process": _default(AsyncCheckpointerType.PROCESS),
    "torch_checkpointing": _peer("torch_checkpointing"),
}
