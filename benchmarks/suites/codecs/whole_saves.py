"""Formats, codecs and incremental saves change whole saves: their durable time, bytes written, and drag on training."""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

import asyncckpt
from asyncckpt.storage.local import LocalStore
from asyncckpt.testing import ThrottledOps
from benchmarks.harness.state import GPT, SIZES, State, plain_state, training_state
from benchmarks.harness.trained import STEPS, trained_run

#: A part of the report says, under these names, what is saved of a state.
Files: TypeAlias = Mapping[str, asyncckpt.Safetensors | asyncckpt.Zarr]

#: A network file system's share, or a cloud disk of the cheaper kind, takes this much.
THROTTLED_BYTES_PER_SECOND = 200e6
LORA_RANK = 8
_PAUSE_SECONDS = 0.3
_WINDOW_ITERATIONS = 4


@dataclass(frozen=True, slots=True)
class Row:
    """Puts a figure beside its bar; ``met`` is None where it has no bar."""

    figure: str
    bar: str
    measured: str
    met: bool | None


def rows(directory: Path, rounds: int, report: Callable[[str], None]) -> list[Row]:
    """Measure one part after the other; this takes several minutes and 6 GB of disk. ``report`` is told what runs."""
    trained_run(directory)
    parts: list[tuple[str, Callable[[Path, Path, int], list[Row]]]] = [
        ("zarr against safetensors, auto against none", _formats),
        ("a throttled device", _throttled),
        ("LoRA", _lora),
        ("delta", _delta),
        ("drag", _drag),
    ]
    found: list[Row] = []
    for name, part in parts:
        report(name)
        with tempfile.TemporaryDirectory(prefix="asyncckpt-bench-", dir=directory) as folder:
            found += part(Path(folder), directory, rounds)
        gc.collect()
    return found


def _formats(directory: Path, _trained_in: Path, rounds: int) -> list[Row]:
    found: list[Row] = []
    for label, state in (
        ("20 tensors of 64 MiB", plain_state(20, 64 << 20)),
        ("GPT-2 small, 592", training_state("gpt2")),
    ):
        kinds: Files = {
            "safetensors": asyncckpt.Safetensors(),
            "zarr": asyncckpt.Zarr(),
            "safetensors auto": asyncckpt.Safetensors(codec="auto"),
            "zarr auto": asyncckpt.Zarr(codec="auto"),
            "safetensors planes": asyncckpt.Safetensors(codec="planes"),
        }
        seconds = _durable(state, kinds, directory, rounds + 2)
        base = seconds["safetensors"]
        speed = _ratio(base, seconds["zarr"])
        found += [
            Row(f"zarr / safetensors, uncompressed, durable; {label}", ">= 0.9 x", _show(speed), _median(speed) >= 0.9),
            *(
                Row(
                    f"{name} / {other}, durable time, fast disk; {label}",
                    "<= 1.05 x",
                    _show(times),
                    _median(times) <= 1.05,
                )
                for name, other, times in (
                    ("safetensors auto", "none", _ratio(seconds["safetensors auto"], base)),
                    ("zarr auto", "none", _ratio(seconds["zarr auto"], seconds["zarr"])),
                )
            ),
            Row(
                f"safetensors planes / none, durable time, fast disk; {label}",
                "",
                _show(_ratio(seconds["safetensors planes"], base)),
                None,
            ),
        ]
    return found


def _throttled(directory: Path, trained_in: Path, rounds: int) -> list[Row]:
    state = {name: _trained(trained_in, "late", name) for name in ("model", "optimizer")}
    kinds = {name: asyncckpt.Zarr(codec=name) for name in ("none", "planes", "auto")}
    ops = ThrottledOps(THROTTLED_BYTES_PER_SECOND)
    seconds = _durable(state, kinds, directory, rounds + 2, ops)
    planes, auto = _ratio(seconds["planes"], seconds["none"]), _ratio(seconds["auto"], seconds["none"])
    return [
        Row(
            "zarr planes / none, durable time at 200 MB/s, trained GPT",
            "<= 0.87 x",
            _show(planes),
            _median(planes) <= 0.87,
        ),
        Row("zarr auto / none, durable time at 200 MB/s, trained GPT", "<= 1.05 x", _show(auto), _median(auto) <= 1.05),
    ]


class _Lora(nn.Module):
    """Adds a trained update of low rank to a frozen linear layer."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(x) + self.up(self.down(x))
        return result


def _lora(directory: Path, _trained_in: Path, _rounds: int) -> list[Row]:
    model = GPT(SIZES["gpt2"]).requires_grad_(False)
    for block in model.blocks:
        for name in ("attention", "attention_out", "up", "down"):
            setattr(block, name, _Lora(getattr(block, name), LORA_RANK))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(trained)
    state: State = {"model": model, "optimizer": optimizer}
    found: list[Row] = []
    kinds: Files = {"safetensors": asyncckpt.Safetensors(), "zarr planes": asyncckpt.Zarr(codec="planes")}
    for label, files in kinds.items():
        written: list[int] = []
        with asyncckpt.Checkpointer(directory / label, files=files) as ckpt:
            for step in range(1, 4):
                for parameter in trained:
                    parameter.grad = torch.randn_like(parameter)
                optimizer.step()
                written.append(ckpt.save(step, state).result().written_bytes)
        part = max(written[1:]) / written[0]
        found.append(
            Row(
                f"LoRA on GPT-2 small, {share:.1%} trainable with Adam, {label}: later saves / the first, bytes",
                "<= 2 %",
                f"{part:.2%} ({written[1] / 1e6:.1f} of {written[0] / 1e6:.0f} MB)",
                part <= 0.02,
            )
        )
    return found


def _delta(directory: Path, trained_in: Path, _rounds: int) -> list[Row]:
    found: list[Row] = []
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        states = [
            {"weights": {name: tensor.to(dtype) for name, tensor in _trained(trained_in, stage, "model").items()}}
            for stage in ("late", "later")
        ]
        nbytes = sum(tensor.nbytes for tensor in states[0]["weights"].values())
        sizes: dict[str, list[float]] = {}
        for name, delta in (("planes", None), ("delta", asyncckpt.Delta(chain=1))):
            with asyncckpt.Checkpointer(
                directory / f"{label}-{name}", files=asyncckpt.Safetensors(codec="planes", delta=delta)
            ) as ckpt:
                reports = [ckpt.save(step, state).result() for step, state in enumerate(states, 1)]
                sizes[name] = [nbytes / report.written_bytes for report in reports]
        found.append(
            Row(
                f"{label} weights ten steps apart: ratio with delta (planes alone)",
                "2.2 x for bf16, as expected" if dtype is torch.bfloat16 else "",
                f"{sizes['delta'][1]:.2f} x ({sizes['planes'][1]:.2f} x)",
                None if dtype is torch.float32 else sizes["delta"][1] >= 2.2,
            )
        )
    return found


def _drag(directory: Path, _trained_in: Path, rounds: int) -> list[Row]:
    """Train on one thread; time a window of iterations with one save in it, by codecs and without a save, by turns."""
    torch.set_num_threads(1)
    state = training_state("gpt2")
    model, optimizer = state["model"], state["optimizer"]
    tokens = torch.randint(0, model.size.vocabulary, (1, 33))
    runs = {
        codec: asyncckpt.Checkpointer(
            directory / codec,
            keep=asyncckpt.KeepLast(1),
            files=asyncckpt.Safetensors(codec=codec),
            staging=asyncckpt.StagingOptions(budget_bytes=1 << 30),
            writer=asyncckpt.WriterOptions(reuse_unchanged=False),
        )
        for codec in ("none", "planes", "auto")
    }
    for ckpt in runs.values():
        ckpt.watch(optimizer)
        ckpt.prepare(state)

    def window(ckpt: asyncckpt.Checkpointer | None, step: int) -> float:
        began = time.perf_counter()
        pending = ckpt.save(step, state) if ckpt is not None else None
        for _ in range(_WINDOW_ITERATIONS):
            model(tokens).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        if ckpt is not None and pending is not None:
            pending.result()
            ckpt.wait()
        time.sleep(_PAUSE_SECONDS)
        return seconds

    times: dict[str, list[float]] = {name: [] for name in ("quiet", *runs)}
    for step in range(1, rounds + 3):
        times["quiet"].append(window(None, step))
        for name, ckpt in runs.items():
            times[name].append(window(ckpt, step))
    for ckpt in runs.values():
        ckpt.close()
    quiet = statistics.median(times["quiet"][1:])
    found: list[Row] = []
    for codec in ("planes", "auto"):
        ratio = _ratio(times[codec], times["none"])
        extra = [1e3 * (statistics.median(times[name][1:]) - quiet) for name in (codec, "none")]
        found.append(
            Row(
                f"training time round a save, {codec} / none; {_WINDOW_ITERATIONS} iterations, {quiet:.1f} s without",
                "<= 1.1 x",
                f"{_show(ratio)}; drag {extra[0]:.0f} and {extra[1]:.0f} ms",
                _median(ratio) <= 1.1,
            )
        )
    return found


def _durable(
    state: State, kinds: Files, directory: Path, saves: int, ops: ThrottledOps | None = None
) -> dict[str, list[float]]:
    """Return the durable seconds of each kind, saved by turns into warm arenas; ratios leave the first of each out."""
    needed = sum(t.nbytes for t in _tensors(state)) + (64 << 20)
    runs = {
        name: asyncckpt.Checkpointer(
            directory / name.replace(" ", "-"),
            keep=asyncckpt.KeepLast(1),
            files=files,
            staging=asyncckpt.StagingOptions(budget_bytes=needed),
            writer=asyncckpt.WriterOptions(reuse_unchanged=False),
            run=asyncckpt.RunOptions(store=LocalStore(str(directory / name.replace(" ", "-")), ops=ops)),
        )
        for name, files in kinds.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for ckpt in runs.values():
        ckpt.prepare(state)
    for step in range(1, saves + 1):
        for name, ckpt in runs.items():
            time.sleep(_PAUSE_SECONDS)
            seconds[name].append(ckpt.save(step, state).result().durable_seconds)
            ckpt.wait()
    for ckpt in runs.values():
        ckpt.close()
        shutil.rmtree(ckpt.path)
    return seconds


def _tensors(state: State) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in state.values():
        if isinstance(value, nn.Module):
            found += list(value.state_dict().values())
        elif isinstance(value, torch.optim.Optimizer):
            found += [t for entry in value.state.values() for t in entry.values()]
        else:
            found += list(value.values())
    return found


def _trained(directory: Path, stage: str, component: str) -> dict[str, torch.Tensor]:
    return trained_run(directory).load_tensors(STEPS[stage], [component])


def _ratio(times: list[float], base: list[float]) -> list[float]:
    """Divide ``times`` by ``base``, neighbours in time; the first of a process is left out."""
    return [a / b for a, b in zip(times[1:], base[1:], strict=True)]


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _show(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} x ({min(values):.2f}..{max(values):.2f})"
