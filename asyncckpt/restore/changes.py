"""A restore that breaks off says which components of the live state it has changed, and which not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from asyncckpt.errors import AsyncCkptError, StateMismatch


class Changes:
    """Remembers which components a restore has begun to change, and goes on remembering where an older checkpoint is
    tried after a damaged one. For the training thread, but for ``begin``, which any thread may call."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._begun: set[str] = set()
        self._left: set[str] = set()
        self._told: BaseException | None = None

    @property
    def overwritten(self) -> tuple[str, ...]:
        """Return the components that have changed, wholly or in part, in the order of the state."""
        return tuple(name for name in self._names if name in self._begun)

    @property
    def untouched(self) -> tuple[str, ...]:
        """Return the components of which nothing has changed."""
        return tuple(name for name in self._names if name not in self._begun)

    def expect(self, names: Iterable[str]) -> None:
        """Say what the components of the live state are."""
        self._names = tuple(names)

    def begin(self, name: str) -> None:
        """Note that this component is about to change."""
        self._begun.add(name)

    def leave(self, where: str, left: Iterable[str]) -> None:
        """Accept what a restore leaves as it is: qualified names, or messages that begin with one and a colon. Raises
        ``StateMismatch`` where an attempt before, from another checkpoint, has changed one of them: half of its new
        values would stay. ``where``: the checkpoint."""
        names = {text.partition(":")[0] for text in left}
        stale = sorted(name for name in names - self._left if name.partition(".")[0] in self._begun)
        if stale:
            raise StateMismatch(
                f"{where}: {', '.join(stale[:20])} would stay as a damaged checkpoint, of which a part was restored "
                f"already, has left them. Make the live objects anew and restore this checkpoint by its step"
            )
        self._left = names

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Let an error of the body say what has changed, in ``overwritten`` and ``untouched``, and in its message where
        anything has. What is no error of this library gets a note."""
        try:
            yield
        except AsyncCkptError as error:
            error.overwritten, error.untouched = self.overwritten, self.untouched
            if self._told is not error:
                self._told = error
                if self._begun and error.args:
                    *first, message = error.args
                    error.args = (*first, f"{str(message).rstrip('.')}. {self.sentence()}")
            raise
        except BaseException as error:
            if self._told is not error:
                self._told = error
                error.add_note(f"asyncckpt: the restore was broken off. {self.sentence()}")
            raise

    def sentence(self) -> str:
        """Return a sentence that says what has changed."""
        if not self._begun:
            return "Nothing of the live state has changed."
        changed = f"Overwritten, wholly or in part: {', '.join(self.overwritten)}"
        untouched = f"untouched: {', '.join(self.untouched)}" if self.untouched else "nothing is untouched"
        return f"{changed}; {untouched}. Make what was overwritten anew, or restore another checkpoint into it."
