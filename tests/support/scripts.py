"""Scripts that run in a process of their own without paying for its start: importing torch takes seconds of CPU time.

The process is forked from the server of the ranks (``harness``), which has imported torch. It has the script's own
arguments, environment, directory and standard streams, runs it as ``__main__``, waits for its threads, calls its
``atexit`` functions and ends with its status. Only the tearing down of modules is left out, which takes a second, too.
Tests of the interpreter's start or of its end, or of what an import does, start ``sys.executable`` themselves.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Mapping
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, Self

from support.harness import CONTEXT, begin


class Script:
    """A running script: a path, or the source itself. As a context manager it is killed where it still runs.

    ``joined``: what it writes to its standard error comes with its standard output, as ``2>&1`` has it.
    """

    def __init__(
        self,
        script: Path | str,
        *arguments: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        joined: bool = False,
    ) -> None:
        self.errors = ""
        stdin, self.stdin = _pipe(writes=True)
        self.stdout, stdout = _pipe(writes=False)
        self._stderr, stderr = (None, stdout) if joined else _pipe(writes=False)
        streams = (stdin, stdout, stderr)
        environment = dict(os.environ if env is None else env)
        self._process: Any = CONTEXT.Process(
            target=_Start(script, tuple(map(str, arguments)), str(cwd or Path.cwd()), environment, streams), daemon=True
        )
        self._process.start()
        for fd in set(streams):
            os.close(fd)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, or the negative number of the signal that ended it; None where it still runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def finish(self, timeout: float = 120.0) -> tuple[int, str, str]:
        """Close its input and wait until it ends: its status, and what it wrote that was not read yet. After
        ``timeout`` seconds it is killed."""
        alarm = threading.Timer(timeout, self.send_signal, (signal.SIGKILL,))
        alarm.start()
        reader = threading.Thread(target=self._read_errors)
        reader.start()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        shown = self.stdout.read()
        reader.join()
        self._process.join()
        alarm.cancel()
        alarm.join()
        self._close()
        assert self.returncode is not None
        return self.returncode, shown, self.errors

    def _read_errors(self) -> None:
        if self._stderr is not None:
            self.errors += self._stderr.read()

    def _close(self) -> None:
        for stream in (self.stdin, self.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.send_signal(signal.SIGKILL)
        self._process.join()
        self._close()


def run(script: Path | str, *arguments: object, timeout: float = 120.0, code: int = 0, **options: Any) -> str:
    """What the script writes to its standard output. Fails where it ends with another status than ``code``."""
    with Script(script, *arguments, **options) as process:
        status, shown, errors = process.finish(timeout)
    assert status == code, f"ended with {status}\n{shown}\n{errors}"
    return shown


def _pipe(*, writes: bool) -> tuple[Any, Any]:
    """Both ends of a pipe, in the order of ``os.pipe``; the end that stays here is a text file."""
    reads_fd, writes_fd = os.pipe()
    if writes:
        return reads_fd, open(writes_fd, "w")
    return open(reads_fd), writes_fd


class _Start:
    """What the forked process runs. Pickled while it is started, which is when its streams are handed over."""

    def __init__(
        self,
        script: Path | str,
        arguments: tuple[str, ...],
        cwd: str,
        environment: dict[str, str],
        streams: tuple[int, int, int],
    ) -> None:
        self.script, self.arguments, self.cwd, self.environment = script, arguments, cwd, environment
        self.streams = streams

    def __reduce__(self) -> Any:
        handed = tuple(map(DupFd, self.streams))
        return _start, (self.script, self.arguments, self.cwd, self.environment, handed)


def _start(
    script: Path | str, arguments: tuple[str, ...], cwd: str, environment: dict[str, str], streams: tuple[Any, ...]
) -> Any:
    return lambda: _become(script, arguments, cwd, environment, [stream.detach() for stream in streams])


def _become(
    script: Path | str, arguments: tuple[str, ...], cwd: str, environment: dict[str, str], streams: list[int]
) -> None:
    begin()
    for target, fd in enumerate(streams):
        os.dup2(fd, target)
    for fd in set(streams):
        os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    # the script is no child of multiprocessing's, and may have daemons of its own
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    status = _run(script, arguments)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(status)


def _run(script: Path | str, arguments: tuple[str, ...]) -> int:
    """The exit status of the script."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    name, source = "<string>", script
    if isinstance(script, Path):
        name, source = str(script), script.read_text()
        main.__file__ = name
        sys.path.insert(0, str(script.parent))
    sys.argv = [name if isinstance(script, Path) else "-c", *arguments]
    try:
        exec(compile(source, name, "exec"), main.__dict__)
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        print(left.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
