"""asyncckpt is measured without ``watch``: ``save`` returns when the whole state is staged. It fsyncs everything by
itself."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from typing import Any

import asyncckpt
from asyncckpt.formats.options import Files, FilesName
from asyncckpt.stage.options import Snapshot
from asyncckpt.write.options import ProcessChoice
from benchmarks.harness.state import State
from benchmarks.peers import Saved, Session

LABEL = "asyncckpt"
_DELETION_SECONDS = 10.0


class Asyncckpt(Session):
    def __init__(
        self,
        state: State,
        directory: str,
        *,
        watch: bool,
        staging_bytes: int | None = None,
        snapshot: Snapshot = "auto",
        files: Files | FilesName = "safetensors",
        process: ProcessChoice = "auto",
    ) -> None:
        super().__init__(state, directory)
        self.snapshot = snapshot
        self.checkpointer = asyncckpt.Checkpointer(
            directory,
            keep=asyncckpt.KeepLast(1),
            files=files,
            staging=asyncckpt.StagingOptions(budget_bytes=staging_bytes, snapshot=snapshot),
            writer=asyncckpt.WriterOptions(reuse_unchanged=False, process=process),
        )
        if watch:
            self.checkpointer.watch(state["optimizer"])
        self.checkpointer.prepare(state)

    def save(self, step: int) -> Saved:
        began = time.perf_counter()
        pending = self.checkpointer.save(step, self.state)
        stall_seconds = time.perf_counter() - began
        durable: Future[float] = Future()

        def finish(done: Any) -> None:
            try:
                done.result(0)
            except BaseException as error:
                durable.set_exception(error)
            else:
                durable.set_result(time.perf_counter() - began)

        pending.add_done_callback(finish)
        return Saved(stall_seconds, durable)

    def restore(self, step: int) -> None:
        self.checkpointer.restore(self.state, step=step)

    def forget(self, step: int) -> None:
        with self.checkpointer.guard():  # as a training step between two saves does: what stayed as it was is deferred
            pass
        # asyncckpt's own retention deletes in the background; until that is over, it would disturb the next measurement
        give_up = time.monotonic() + _DELETION_SECONDS
        while time.monotonic() < give_up and (
            os.path.exists(self.path(step)) or any(name.startswith(".trash-") for name in os.listdir(self.directory))
        ):
            time.sleep(0.005)

    def close(self) -> None:
        self.checkpointer.close()


def setup(state: State, directory: str, *, staging_bytes: int | None = None) -> Session:
    return Asyncckpt(state, directory, watch=False, staging_bytes=staging_bytes)
