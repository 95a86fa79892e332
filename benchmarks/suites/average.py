"""``python -m benchmarks average`` compares an average of three checkpoints with reading the three."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from asyncckpt import Checkpointer, Run
from asyncckpt.derive import average
from benchmarks.harness import environment
from benchmarks.harness.raw import Ceiling
from benchmarks.harness.report import tell
from benchmarks.harness.results import Result, Table
from benchmarks.harness.state import GPT, SIZES

TITLE = "Average of three checkpoints"
_HEAD = ["weights", "reads of the three", "reads, verified", "average", "of the verified reads", "bar", "met"]
_BAR = 0.5
_COUNT = 3


@dataclass(frozen=True, slots=True)
class Times:
    """One round: the seconds that reading the files of the three took (O_DIRECT, cold, into warm memory), that reading
    their tensors did, verified, into new memory, and that their average took until it was durable."""

    dtype: str
    nbytes: int
    raw_seconds: float
    read_seconds: float
    average_seconds: float


def run(directory: Path, rounds: int, size: str, out: Path | None, as_json: bool, console: Console) -> Result:
    """Measure, print and return the result; progress goes to stderr."""
    progress = Console(stderr=True)
    times: list[Times] = []
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            times += _measure(Path(folder), rounds, size, dtype, lambda line: progress.print(line, highlight=False))
    rows, met = [], []
    for kind in dict.fromkeys(one.dtype for one in times):
        of_dtype = [one for one in times if one.dtype == kind]
        share = statistics.median(one.read_seconds / one.average_seconds for one in of_dtype)
        met.append(share >= _BAR)
        cells = [
            f"{statistics.median(values):.2f} s"
            for values in zip(*((t.raw_seconds, t.read_seconds, t.average_seconds) for t in of_dtype), strict=True)
        ]
        weights = f"{_COUNT} of {of_dtype[0].nbytes / 1e6:.0f} MB {kind}"
        rows.append([weights, *cells, f"{share:.2f}", f"≥ {_BAR}", "yes" if met[-1] else "**no**"])
    described = environment.describe(str(directory))
    asked = f"python -m benchmarks average --rounds {rounds} --size {size}"
    data = {"options": {"suite": "average", "rounds": rounds, "size": size}, "rounds": [asdict(one) for one in times]}
    tables = [Table(TITLE, _HEAD, rows)]
    result = Result("average", asked, described, tables, f"{environment.sentence(described)}.", data)
    tell(result, met, console, out=out, as_json=as_json)
    return result


def _measure(folder: Path, rounds: int, size: str, dtype: torch.dtype, say: Callable[[str], None]) -> list[Times]:
    path = folder / "run"
    model = GPT(SIZES[size]).to(dtype)
    with Checkpointer(path) as run:
        for step in range(1, _COUNT + 1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)
            run.save(step, {"model": model}, weights_only=True).result()
    nbytes = Run(path).ls()[0].nbytes
    files = [str(file) for file in path.glob("weights-*/model-*.safetensors")]
    ceiling = Ceiling(list(model.parameters()), str(folder / "raw"))
    times: list[Times] = []
    for number in range(rounds + 1):  # the first round is not counted
        raw_seconds = ceiling.read(files)
        read_seconds = _seconds(lambda: [Run(path).load_tensors(step, ["model"]) for step in range(1, _COUNT + 1)])
        average_seconds = _seconds(lambda: average(path, last=_COUNT))
        for made in path.glob("average-*"):
            shutil.rmtree(made)
        if number:
            times.append(Times(str(dtype).removeprefix("torch."), nbytes, raw_seconds, read_seconds, average_seconds))
            say(str(times[-1]))
    ceiling.close()
    return times


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
