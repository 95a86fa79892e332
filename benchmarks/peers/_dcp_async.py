"""Both kinds of ``torch.distributed.checkpoint.async_save`` share one stager, kept from save to save, that stages on a
thread of its own. Pinned memory and non-blocking copies need a GPU, so they are off without one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save

from benchmarks.harness.state import State
from benchmarks.peers import Saved, in_background
from benchmarks.peers._dcp import DcpSession


class DcpAsync(DcpSession):
    def __init__(self, state: State, directory: str, kind: AsyncCheckpointerType) -> None:
        super().__init__(state, directory)
        gpu = torch.accelerator.is_available()
        shared = kind is AsyncCheckpointerType.PROCESS
        self._kind = kind
        self._stager = DefaultStager(StagingOptions(gpu, shared, True, gpu))
        self._staged: Future[Any] | None = None
        # the staging memory is allocated and faulted in ahead, as a prepared arena is
        staged = self._stager.stage(self.state_dict())
        if isinstance(staged, Future):
            staged.result()

    def save(self, step: int) -> Saved:
        began = time.perf_counter()
        response = async_save(
            self.state_dict(),
            storage_writer=self.writer(step),
            async_stager=self._stager,
            async_checkpointer_type=self._kind,
        )
        if isinstance(response, AsyncSaveResponse):
            self._staged = response.staging_completion
            return in_background(began, response.upload_completion, self.path(step))
        return in_background(began, response, self.path(step))

    def guard(self) -> AbstractContextManager[object]:
        return self._wait_staged()

    @contextmanager
    def _wait_staged(self) -> Iterator[None]:
        if self._staged is not None:
            self._staged.result()
            self._staged = None
        yield

    def close(self) -> None:
        self._stager.close()
        super().close()
