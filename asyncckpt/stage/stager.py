"""The background thread that copies deferred state."""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue

from asyncckpt.stage.job import StagingJob

log = logging.getLogger("asyncckpt")


class Stager:
    """Works on deferred jobs, in the order given, on one daemon thread, which the first ``submit`` starts and ``close``
    ends. Neither blocks. For the training thread."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[StagingJob | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: StagingJob) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="asyncckpt-stager", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def close(self) -> None:
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.run_in_background()
            except BaseException as error:  # costs that save, and no other
                log.exception("step %d: the thread that copies was interrupted", job.step)
                job.cancel(error)
            del job  # an idle thread must not keep a snapshot alive
