"""Calls from the host to a guest: files in a directory that both see. Only the standard library, for a quick start.

A call is a file of its own, made by a rename: a guest's cache of the host's directory never holds half of one.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.02


class CallFailed(AssertionError):
    """What was called in the guest raised; the text is the guest's traceback."""


class Caller:
    """The host's end. ``alive`` says whether the guest is still there to answer."""

    def __init__(self, folder: Path, alive: Callable[[], bool]) -> None:
        self._folder = folder
        self._alive = alive
        self._number = 0
        folder.mkdir(parents=True)

    def call(self, name: str, *, timeout_seconds: float = 120.0, **arguments: Any) -> Any:
        """Blocks until the answer is there. Raises ``CallFailed`` where the call failed, ``TimeoutError`` where no
        answer came."""
        self._number += 1
        _write(self._folder / f"call-{self._number}", {"name": name, "arguments": arguments})
        answer = self._folder / f"answer-{self._number}"
        deadline = time.monotonic() + timeout_seconds
        while not answer.exists():
            if time.monotonic() > deadline or not self._alive():
                raise TimeoutError(f"{self._folder}: no answer to {name} {arguments} (see the console beside it)")
            time.sleep(_POLL_SECONDS)
        body = json.loads(answer.read_text())
        if "error" in body:
            raise CallFailed(f"{name} {arguments}\n{body['error']}")
        return body["value"]


def serve(folder: Path, functions: dict[str, Callable[..., Any]]) -> None:
    """The guest's end: answer one call after the other, for ever."""
    number = 1
    while True:
        call = folder / f"call-{number}"
        while not call.exists():
            time.sleep(_POLL_SECONDS)
        body = json.loads(call.read_text())
        try:
            answer = {"value": functions[body["name"]](**body["arguments"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        _write(folder / f"answer-{number}", answer)
        number += 1


def _write(path: Path, body: Any) -> None:
    temp = path.with_suffix(".part")
    with temp.open("w") as file:
        json.dump(body, file)
        file.flush()
        os.fsync(file.fileno())  # the host sees a guest's bytes once they are written back
    temp.rename(path)
