"""Conversions against a raw copy of the same bytes, and against the formats' own libraries:
``python -m benchmarks.suites.formats``.

Each round is: a raw copy (O_DIRECT reads and writes by turns, then fsync), and each conversion in a process of its own
that has imported its libraries before the clock starts. Pages of files are dropped from the cache before each.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from asyncckpt.memory.buffers import aligned_buffer

_PIECE_BYTES: Final = 8 << 20
#: What is measured, what it is compared with, and the bar on the other's seconds over its own.
_BARS: Final = {
    "export safetensors": ("raw copy", 0.8),
    "import pt": ("raw copy", 0.5),
    "import safetensors": ("raw copy", 0.5),
    "export pt": ("raw copy", None),
    "export gguf": ("gguf's own writer", 1.0),
    "export onnx": ("onnx's own writer", 1.0),
}
_TIMED: Final = """
import sys, time, json
import torch
what, source, target = sys.argv[1:4]
from asyncckpt import Run
from asyncckpt.convert.formats import export_checkpoint, import_checkpoint
import torch._subclasses.fake_tensor, gguf, onnx, onnx.helper, onnx.external_data_helper
kind, _, fmt = what.partition(" ")
if kind == "gguf's":
    with Run(source).open() as checkpoint:
        from asyncckpt.restore.restore import load_tensors
        began = time.perf_counter()
        tensors = load_tensors(checkpoint, ["model"])
        writer = gguf.GGUFWriter(target, "unknown")
        for name, tensor in tensors.items():
            writer.add_tensor(name.removeprefix("model."), tensor.numpy())
        writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
elif kind == "onnx's":
    with Run(source).open() as checkpoint:
        from asyncckpt.restore.restore import load_tensors
        began = time.perf_counter()
        tensors = load_tensors(checkpoint, ["model"])
        made = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
        model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=made))
        onnx.save_model(model, target, save_as_external_data=True, location="own.onnx.data")
        target += ".data"
else:
    began = time.perf_counter()
    if kind == "import":
        import_checkpoint(source, target, 1)
    else:
        with Run(source).open() as checkpoint:
            export_checkpoint(checkpoint, target, format={"pt": "torch"}.get(fmt, fmt))
if kind.endswith("s"):
    import os
    with open(target, "rb") as file:
        os.fsync(file.fileno())
print(json.dumps(time.perf_counter() - began))
"""


def copy(source: Path, target: Path) -> float:
    """Copy a file past the page cache, and return the seconds until the copy is on the disk."""
    began = time.perf_counter()
    reading = os.open(source, os.O_RDONLY | os.O_DIRECT)
    writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    buffer = memoryview(aligned_buffer(_PIECE_BYTES))
    nbytes = os.fstat(reading).st_size
    at = 0
    while at < nbytes:
        got = os.preadv(reading, [buffer], at)
        os.pwrite(writing, buffer[: -(-got // 4096) * 4096], at)
        at += got
    os.ftruncate(writing, nbytes)
    os.fsync(writing)
    os.close(reading)
    os.close(writing)
    return time.perf_counter() - began


def _forget(folder: Path) -> None:
    """Have the kernel drop what it keeps of the files below a directory."""
    os.sync()
    for where, _, files in os.walk(folder):
        for name in files:
            fd = os.open(os.path.join(where, name), os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _timed(what: str, source: Path, target: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _TIMED, what, str(source), str(target)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def _made(folder: Path, gib: float) -> None:
    """Make a checkpoint of so many GiB, and the files that are imported."""
    import torch

    from asyncckpt import Checkpointer

    count = max(1, int(gib * 16))
    model = torch.nn.ParameterDict({f"layer{n}": torch.randn(4096, 4096) for n in range(count)})
    with Checkpointer(folder / "run") as run:
        run.save(1, {"model": model}).result()
    torch.save(model.state_dict(), folder / "in.pt")
    from safetensors.torch import save_file

    save_file(dict(model.state_dict()), folder / "in.safetensors")


def measure(
    directory: Annotated[Path | None, typer.Option(help="on the file system to measure")] = None,
    gib: Annotated[float, typer.Option(help="size of the checkpoint")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="file for all figures as JSON")] = None,
) -> None:
    """Measure the conversions and print a table."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=directory) as name:
        folder = Path(name)
        _made(folder, gib)
        ways: dict[str, tuple[Path, str]] = {
            "export safetensors": (folder / "run", "out.safetensors"),
            "import pt": (folder / "in.pt", "out-run"),
            "import safetensors": (folder / "in.safetensors", "out-run"),
            "export pt": (folder / "run", "out.pt"),
            "export gguf": (folder / "run", "out.gguf"),
            "gguf's own writer": (folder / "run", "own.gguf"),
            "export onnx": (folder / "run", "out.onnx"),
            "onnx's own writer": (folder / "run", "own.onnx"),
        }
        for _ in range(rounds):
            _forget(folder)
            seconds.setdefault("raw copy", []).append(copy(folder / "in.safetensors", folder / "out.raw"))
            for what, (source, target) in ways.items():
                _clean(folder)
                _forget(folder)
                seconds.setdefault(what, []).append(_timed(what, source, folder / target))
            _clean(folder)
    nbytes = int(gib * 16) * 4096 * 4096 * 4
    _print(seconds, nbytes)
    if out is not None:
        out.write_text(json.dumps({"nbytes": nbytes, "seconds": seconds}))


def _clean(folder: Path) -> None:
    for path in [*folder.glob("out*"), *folder.glob("own*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _print(seconds: dict[str, list[float]], nbytes: int) -> None:
    table = Table("conversion", "seconds", "GB/s", "against", "ratio", "bar")
    medians = {what: statistics.median(found) for what, found in seconds.items()}
    for what, middle in medians.items():
        other, bar = _BARS.get(what, (None, None))
        row: list[Any] = [what, f"{middle:.2f}", f"{nbytes / middle / 1e9:.2f}"]
        if other is not None:
            ratio = medians[other] / middle
            verdict = "" if bar is None else f"{bar} {'met' if ratio >= bar else 'NOT MET'}"
            row += [other, f"{ratio:.2f}", verdict]
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    typer.run(measure)
