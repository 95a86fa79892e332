"""``AsyncCheckpointEngine`` is DeepSpeed's ``CheckpointEngine`` over asyncckpt."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from asyncckpt.checkpointer import Checkpointer
from asyncckpt.commit.pending import PendingSave
from asyncckpt.errors import InvalidOption, RanksDisagree, RunPathError, SaveFailed
from asyncckpt.integrations.deepspeed.loading import component_of, load_file
from asyncckpt.integrations.deepspeed.tags import (
    check_tag,
    folder_for,
    foreign_files,
    publish,
    remove_dangling,
)
from asyncckpt.integrations.deepspeed.values import to_plain
from asyncckpt.ownership import RunOptions
from asyncckpt.run import Run

log = logging.getLogger("asyncckpt")

#: The component that says which tag this is, and which files each rank has given.
ABOUT = "deepspeed"


def attach(engine: Any, **options: Any) -> AsyncCheckpointEngine:
    """Have ``engine.save_checkpoint`` and ``engine.load_checkpoint`` save and load through asyncckpt:
    ``attach(engine)``, once, after ``deepspeed.initialize``, on every rank. ``options``: those of ``Checkpointer``
    (``keep``, ``files``, ``ranks``, …). Returns what DeepSpeed saves with from now on, whose ``wait`` blocks until
    every save is durable. Never blocks. Raises ``InvalidOption`` for an engine that writes files past its checkpoint
    engine (NVMe offload, node-local storage), and for one that this was called on already."""
    if isinstance(engine.checkpoint_engine, AsyncCheckpointEngine):
        raise InvalidOption("attach: this engine saves through asyncckpt already")
    for asked, what in ((engine.zero_nvme_offload_optimizer, "NVMe offload"), (engine.use_node_local_storage, "")):
        if asked():
            raise InvalidOption(
                f"attach: DeepSpeed writes files of {what or 'checkpoint.use_node_local_storage'} past its checkpoint "
                f"engine, so no checkpoint of ours would have them; turn it off, or save with DeepSpeed's own engine"
            )
    saves = AsyncCheckpointEngine(engine, engine.checkpoint_engine, options)
    engine.checkpoint_engine = saves
    save, load = engine.save_checkpoint, engine.load_checkpoint

    @functools.wraps(save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with saves.collecting():
            done = save(*args, **kwargs)
            saves.begin()
        return done

    @functools.wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        saves.wait()
        dist.barrier()
        return load(*args, **kwargs)

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
    return saves


class AsyncCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """Takes the files that the ranks save for a tag, and makes one checkpoint of all of them, in the background.

    ``attach`` makes it. All checkpoints of a directory belong to one run, the folder ``asyncckpt-run`` in it. Once a
    checkpoint is durable, rank 0 puts small text files into the tag's directory, where DeepSpeed looks for its own, and
    then writes ``latest``. For the training thread; errors of background saves are raised by the next save, by ``wait``
    and by ``close``.
    """

    def __init__(self, engine: Any, torchs: Any, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.name = "AsyncCheckpointEngine"
        self._engine = engine
        #: DeepSpeed's own engine writes what belongs to no tag, such as ``save_16bit_model``'s file.
        self._torchs = torchs
        self._options = dict(options)
        self._checkpointer: Checkpointer | None = None
        self._reached = -1
        self._collecting = False
        self._info: CheckpointCommitInfo | None = None
        self._files: dict[str, Any] = {}
        #: The latest save, as rank 0 makes it visible; set once it is.
        self._visible = threading.Event()
        self._visible.set()
        self._failure: BaseException | None = None

    # -- what DeepSpeed calls ----------------------------------------------------------------------------------------

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin to collect the files of a tag. Raises ``InvalidOption`` for a tag that is no name, ``RunPathError``
        where its directory holds files of others, and what a save before has raised."""
        if not self._collecting:
            self._torchs.create(info)
            return
        self._surface()
        check_tag(info.tag)
        found = foreign_files(Path(info.save_dir), info.tag)
        if found:
            raise RunPathError(
                f"{info.save_dir}/{info.tag}: there are files in it that asyncckpt did not write ({found[0]}); save "
                f"with another tag, or into another directory"
            )
        self._info, self._files = info, {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory, but not that of a tag, which appears with its checkpoint."""
        if self._info is None or os.path.abspath(path) != self._directory_of_tag():
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Take a file of the tag. Nothing is copied or written yet."""
        if self._info is None or os.path.dirname(os.path.abspath(path)) != self._directory_of_tag():
            self._torchs.save(state_dict, path)
        else:
            self._files[os.path.basename(path)] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return what was saved as this file: every byte is verified, and nothing is unpickled. A file of plain
        DeepSpeed is read by ``torch.load`` with ``weights_only=True``. Raises ``CheckpointNotFound``,
        ``CheckpointDamaged`` and ``RunPathError``."""
        return load_file(Path(path), map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Finish what belongs to no tag; a tag is committed in the background."""
        return True if self._collecting else bool(self._torchs.commit(info))

    def is_decoupled(self) -> bool:
        """A save goes on after ``save_checkpoint`` has returned: so DeepSpeed itself writes no ``latest``."""
        return True

    def get_commit_info(self) -> None:
        """There is never anything that DeepSpeed has to commit, or to wait for before a step."""
        return

    def preserves_storage_sharing(self) -> bool:
        """Tensors are stored by themselves, whatever they share: nothing has to be cloned before."""
        return False

    def cleanup(self) -> None:
        """Do what ``close`` does; ``engine.destroy()`` calls it."""
        self.close()

    # -- one save ----------------------------------------------------------------------------------------------------

    def collecting(self) -> _Collecting:
        """Return a context in which files of one tag are collected."""
        return _Collecting(self)

    def begin(self) -> None:
        """Save what was collected on all ranks. Blocks until it is copied, and for the other ranks. Raises as
        ``Checkpointer.save`` does, and what hinders any rank on all of them."""
        info, files = self._info, self._files
        if info is None:
            raise SaveFailed("DeepSpeed has saved without saying as what")
        directory = Path(os.path.abspath(info.save_dir))
        problem: BaseException | None = None
        state: dict[str, Any] = {}
        try:
            state = {component_of(name): to_plain(value, name) for name, value in files.items()}
        except Exception as error:
            problem = error
        step = int(self._engine.global_steps)
        folder, told = self._agree(directory, step, sorted(files), problem)
        checkpointer = self._opened(directory / folder)
        names = [name for one in told for name in one]
        state[ABOUT] = {"tag": info.tag, "files": sorted(files)}
        self._reached = step
        pending = checkpointer.save(step, state, name=info.tag)
        if dist.get_rank() == 0:
            visible = self._visible = threading.Event()
            pending.add_done_callback(lambda done: self._settle(done, info, directory, folder, names, visible))

    def _agree(
        self, directory: Path, step: int, names: list[str], problem: BaseException | None
    ) -> tuple[str, list[list[str]]]:
        """Return the run's folder and the files of each rank. Raises on all ranks what is in one's way."""
        folder, reached = "", -1
        if dist.get_rank() == 0 and problem is None:
            try:
                folder, reached = folder_for(directory, max(step, 0))
            except Exception as error:
                problem = error
        mine = (folder, reached, names, None if problem is None else f"{type(problem).__name__}: {problem}")
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, mine)
        if problem is not None:
            raise problem
        failed = [(rank, one[3]) for rank, one in enumerate(told) if one[3] is not None]
        if failed:
            raise SaveFailed(f"rank {failed[0][0]} cannot save: {failed[0][1]}")
        given = [name for one in told for name in one[2]]
        twice = sorted({name for name in given if given.count(name) > 1})
        if twice:
            raise RanksDisagree(f"several ranks have given the file {twice[0]} of one tag; each has to be one rank's")
        return told[0][0], [one[2] for one in told]

    def _opened(self, run: Path) -> Checkpointer:
        if self._checkpointer is not None and self._checkpointer.path != Run(run).path:
            self.close()
        if self._checkpointer is None:
            options = {"run": RunOptions(create_parents=True), **self._options}
            self._checkpointer = Checkpointer(run, **options)
        return self._checkpointer

    def _settle(
        self,
        done: PendingSave,
        info: CheckpointCommitInfo,
        directory: Path,
        folder: str,
        names: list[str],
        visible: threading.Event,
    ) -> None:
        """Make a tag visible once its checkpoint is durable."""
        try:
            if not done.failed():
                publish(directory, info.tag, folder, names, latest=info.save_latest)
                if self._options.get("keep"):
                    kept = [name for entry in Run(directory / folder).ls() for name in entry.names]
                    remove_dangling(directory, folder, kept)
        except BaseException as error:
            self._failure = error
        finally:
            visible.set()

    def _directory_of_tag(self) -> str:
        return "" if self._info is None else os.path.abspath(os.path.join(self._info.save_dir, self._info.tag))

    # -- waiting -----------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Block until every save is durable and ``latest`` says so. Raises what failed in the background."""
        if self._checkpointer is not None:
            self._checkpointer.wait()
        self._visible.wait()
        self._surface()

    def close(self) -> None:
        """Wait for every save, and give the directory back; the next save takes it again. Raises what failed in the
        background. Idempotent."""
        checkpointer, self._checkpointer = self._checkpointer, None
        if checkpointer is not None:
            checkpointer.close()
            self._visible.wait()
        self._surface()

    def _surface(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise SaveFailed(f"a checkpoint is durable, and its tag could not be written: {failure}") from failure


class _Collecting:
    """Is entered while DeepSpeed's own code saves a tag."""

    def __init__(self, engine: AsyncCheckpointEngine) -> None:
        self._saves = engine

    def __enter__(self) -> None:
        self._saves._collecting = True

    def __exit__(self, *_raised: object) -> None:
        self._saves._collecting = False
        self._saves._info, self._saves._files = None, {}
