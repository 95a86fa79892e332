"""What people get wrong in their first week. Each mistake is answered by a typed error that says what is wrong, where,
and what to do, before anything is changed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asyncckpt import (
    AsyncCkptError,
    Checkpointer,
    CheckpointNotFound,
    InvalidOption,
    InvalidStep,
    KeepBest,
    NewestDamaged,
    Run,
    RunPathError,
    Safetensors,
    StateMismatch,
    StepExists,
    UnknownName,
    UnsupportedValue,
    WriterOptions,
)


def _state(width: int = 4) -> dict[str, Any]:
    model = nn.Linear(width, 4)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


class World:
    """A directory with one run, of one checkpoint, and room for others."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with Checkpointer(path / "run") as run:
            run.save(5, _state(), metrics={"loss": 1.0}).result()
        (path / "a-file").write_text("mine")

    def run(self) -> Run:
        return Run(self.path / "run")

    def run_with_a_damaged_newest(self) -> Run:
        with Checkpointer(self.path / "run") as run:
            run.save(6, _state()).result()
        os.truncate(self.path / "run" / "step-00000006" / "manifest.json", 9)
        return self.run()

    def new(self, name: str = "other", **options: Any) -> Checkpointer:
        return Checkpointer(self.path / name, **options)


@dataclass(frozen=True)
class Mistake:
    """A call, the error that it must end in, and what its message must hold."""

    name: str
    call: Callable[[World], object]
    error: type[Exception]
    told: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def _twice(world: World) -> None:
    with world.new() as run:
        run.save(1, _state()).result()
        run.save(1, _state())


MISTAKES = [
    # paths
    Mistake(
        "a parent that is not there",
        lambda w: w.new("no/such/run").save(1, _state()),
        RunPathError,
        ("no/such/run", "create_parents=True"),
    ),
    Mistake("a file for a directory", lambda w: w.new("a-file").save(1, _state()), RunPathError, ("a-file", "file")),
    Mistake("no run there", lambda w: Run(w.path / "rum").restore(_state()), CheckpointNotFound, ("rum",)),
    Mistake("no path", lambda w: Checkpointer(None), InvalidOption, ("path", "None")),  # type: ignore[arg-type]
    Mistake("a bucket", lambda w: Checkpointer("s3://bucket/run"), InvalidOption, ("s3://", "mounted")),
    # steps
    Mistake("a step that is text", lambda w: w.new().save("1", _state()), InvalidStep, ("'1'", "whole number")),  # type: ignore[arg-type]
    Mistake("a step below nought", lambda w: w.new().save(-1, _state()), InvalidStep, ("-1", ">= 0")),
    Mistake("a step twice", _twice, StepExists, ("step 1", "overwrite=True")),
    Mistake("a step that is not there", lambda w: w.run().restore(_state(), 6), CheckpointNotFound, ("step 6", "5")),
    # the state
    Mistake("a module for a state", lambda w: w.new().save(1, nn.Linear(2, 2)), InvalidOption, ("{'model': model",)),  # type: ignore[arg-type]
    Mistake("no state", lambda w: w.new().save(1, {}), InvalidOption, ("non-empty", "{'model': model")),
    Mistake(
        "a function in the state",
        lambda w: w.new().save(1, {"extra": {"fn": len}}),
        UnsupportedValue,
        ("state['extra']['fn']", "state_dict"),
    ),
    Mistake(
        "an optimizer without its model",
        lambda w: w.new().save(1, {"optimizer": _state()["optimizer"]}),
        UnsupportedValue,
        ("optimizer", "Add the module"),
    ),
    Mistake(
        "a model of another shape",
        lambda w: w.run().restore({"model": nn.Linear(5, 4)}),
        StateMismatch,
        ("model.weight", "[4, 4]", "[4, 5]", "strict=False"),
    ),
    Mistake(
        "resuming a model of another shape",
        lambda w: Checkpointer(w.path / "run").resume({"model": nn.Linear(5, 4)}),
        StateMismatch,
        ("model.weight", "restore(state, strict=False)"),
    ),
    Mistake(
        "a component of another name",
        lambda w: w.run().restore({"modle": nn.Linear(4, 4)}),
        StateMismatch,
        ("modle.weight",),
    ),
    # names that match nothing
    Mistake(
        "a prefix that selects nothing",
        lambda w: w.run().restore(_state(), include=["modle."]),
        UnknownName,
        ("'modle.'", "model, optimizer", "run/step-00000005"),
    ),
    Mistake(
        "a prefix inside an optimizer",
        lambda w: w.run().restore(_state(), include="optimizer.state"),
        UnknownName,
        ("'optimizer.state'", "whole components"),
    ),
    Mistake(
        "a renaming of nothing",
        lambda w: w.run().restore(_state(), rename={"encoder.": "model."}),
        UnknownName,
        ("'encoder.'", "asyncckpt show"),
    ),
    Mistake(
        "two tensors renamed to one",
        lambda w: w.run().restore(_state(), rename=lambda _name: "model.weight"),
        InvalidOption,
        ("model.weight", "same name"),
    ),
    Mistake(
        "a tensor that is not there",
        lambda w: w.run().load_tensors(names=["model.wieght"]),
        UnknownName,
        ("model.wieght", "model.weight"),
    ),
    # reading
    Mistake(
        "a required component by a wrong name",
        lambda w: w.run().verify(require="model.weight"),
        InvalidOption,
        ("'model.weight'", "keys of the saved state"),
    ),
    Mistake("a number for required components", lambda w: w.run().verify(require=3), InvalidOption, ("require", "3")),  # type: ignore[arg-type]
    Mistake(
        "reading a newest checkpoint that is damaged",
        lambda w: w.run_with_a_damaged_newest().load_tensors(),
        NewestDamaged,
        ("step-00000006", "give its step", "newest usable one is 5"),
    ),
    Mistake(
        "annotating a step that is not there",
        lambda w: w.run().annotate(6, {"val_loss": 0.3}),
        CheckpointNotFound,
        ("step 6", "5"),
    ),
    Mistake(
        "annotating with a number alone",
        lambda w: w.run().annotate(5, 0.3),  # type: ignore[arg-type]
        InvalidOption,
        ("{'val_loss': 0.3}", "0.3"),
    ),
    Mistake(
        "annotating with text",
        lambda w: w.run().annotate(5, {"val_loss": "low"}),
        InvalidOption,
        ("metrics['val_loss']", "'low'"),
    ),
    Mistake(
        "a metric without a name", lambda w: w.run().annotate(5, {"": 1.0}), InvalidOption, ("printable text", "''")
    ),
    # options
    Mistake("a number for a policy", lambda w: w.new(keep=3), InvalidOption, ("KeepLast(3)", "not 3")),
    Mistake("text for a cadence", lambda w: w.new(every="100"), InvalidOption, ("number of steps", "'100'")),
    Mistake("every nought steps", lambda w: w.new(every=0), InvalidOption, (">= 1", "0")),
    Mistake(
        "the best without a direction", lambda w: KeepBest("accuracy"), InvalidOption, ("'accuracy'", "mode='max'")
    ),
    Mistake("a format's name", lambda w: w.new(files="safetensor"), InvalidOption, ("'safetensors'", "'zarr'")),
    Mistake("a codec's name", lambda w: Safetensors(codec="zsdt"), UnknownName, ("zsdt", "zstd")),
    Mistake("a digest's name", lambda w: WriterOptions(digest="md5"), UnknownName, ("md5", "sha256")),
    Mistake(
        "a dict for options", lambda w: w.new(staging={"budget_bytes": 1}), InvalidOption, ("staging", "StagingOptions")
    ),
    Mistake("a number for preemption", lambda w: w.new(preemption=30), InvalidOption, ("preemption", "Preemption(")),
    Mistake("no function for events", lambda w: w.new(on_event=3), InvalidOption, ("on_event", "functions")),
    Mistake("a metric alone", lambda w: w.new().save(1, _state(), metrics=0.3), InvalidOption, ("{'loss': 0.3}",)),  # type: ignore[arg-type]
    Mistake(
        "a metric that is text",
        lambda w: w.new().save(1, _state(), metrics={"loss": "low"}),
        InvalidOption,
        ("metrics['loss']", "'low'"),
    ),
    Mistake(
        "watching a module",
        lambda w: w.new().watch(nn.Linear(2, 2)),  # type: ignore[arg-type]
        InvalidOption,
        ("torch.optim.Optimizer", "Linear"),
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_answered_with_what_where_and_what_to_do(mistake: Mistake, tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(mistake.error) as caught:
        mistake.call(world)
    told = str(caught.value)
    assert not [part for part in mistake.told if not re.search(re.escape(part), told)], told
    assert isinstance(caught.value, AsyncCkptError)
    # and nothing was lost
    assert world.run().verify(5) == []
    assert (tmp_path / "a-file").read_text() == "mine"
