"""Makes the golden corpus: one small checkpoint of every format, written by the very version that first wrote it.

``python tests/golden/make.py all`` writes what ``tests/golden`` lacks: for each entry it checks out the entry's commit
in a temporary git worktree and runs itself there with that commit's ``asyncckpt``. ``make.py write NAME OUT`` writes
one entry with whatever ``asyncckpt`` is imported. An entry that is there is never written again: that a newer version
can still read what an older one wrote is what it is for.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__:  # imported by the test
    from golden import states
else:
    import states

HERE = Path(__file__).resolve().parent
#: Small, so that small tensors have several chunks and several extents.
EXTENT_BYTES = 32768
SHARD_BYTES = 1 << 20
METRICS = {"loss": 0.5, "lost": float("nan")}
CONFIG = {"layers": [1, 2], "name": "golden"}


@dataclass(frozen=True)
class Save:
    """One checkpoint of an entry. ``options`` are those of ``Checkpointer``; where they differ from the save before, a
    new ``Checkpointer`` is made."""

    step: int
    state: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights_only: bool = False
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A run directory of the corpus. ``commit`` wrote it; ``versions`` are the format versions of its manifests."""

    commit: str
    versions: tuple[int, ...]
    saves: tuple[Save, ...]
    ranks: int = 1
    by_dcp: bool = False
    #: Chunks are split into planes where their tensors are, as on a GPU.
    on_device: bool = False


def _each(name: str, *options: Mapping[str, Any]) -> tuple[Save, ...]:
    return tuple(Save(step, name, one) for step, one in enumerate(options, 1))


_DELTA = {"codec": "planes", "delta": 2}
_FIRST = (
    Save(1, "whole"),
    Save(2, "middle", {"digest": "sha256", "extent_bytes": 8192}),
    Save(3, "values", {"digest": "crc32c"}),
    Save(4, "whole", {"digest": "blake3"}, weights_only=True),
)
_PLANES = _each("large", {"codec": "planes"})
_SPLIT = _each("large", {"codec": "planes"}, {"format": "zarr", "codec": "planes"})
_CODECS = _each("one", {"codec": "zstd"}, {"codec": "lz4"}, {"codec": "blosc"}, {"codec": "auto"})
_ZARR = (
    Save(1, "middle", {"format": "zarr", "extent_bytes": 8192}),
    Save(2, "large", {"format": "zarr", "codec": "planes"}),
    Save(3, "one", {"format": "zarr", "codec": "zstd"}),
)
_CHAIN = _each("moving", _DELTA, _DELTA, _DELTA)
_RANKS = (Save(1, "ranks"), Save(2, "fsdp"))
_ENCODED = (Save(1, "fsdp", {"codec": "planes"}), Save(2, "fsdp", {"format": "zarr", "codec": "planes"}))
_BOXES = (Save(1, "ranks", {"layout": "ranks"}), Save(2, "fsdp", {"layout": "ranks"}))
_PARTS = (
    Save(1, "ranks", {"layout": "ranks", "manifest_rows": 0}),
    Save(2, "fsdp", {"layout": "ranks", "manifest_rows": 0}),
)
_TYPED = (Save(1, "typed"), Save(2, "typed", {"format": "zarr"}))
_WRAPPED = (Save(1, "wrapped"), Save(2, "wrapped", {"format": "zarr"}))
_ASSETS = {"assets": {"config.json": "{}", "notes/first.txt": "asset"}}
_NAMED = (Save(1, "values", _ASSETS, names=("epoch=1", "last")), Save(2, "values", _ASSETS, names=("last",)))
_DCP = (Save(1, "fsdp"),)
_HEAD = "26ebec8"
ENTRIES: dict[str, Entry] = {
    "v1-safetensors-4bfd2d8": Entry("4bfd2d8", (1,), _FIRST),
    "v1-safetensors-04f6d9f": Entry("04f6d9f", (1,), _FIRST),
    "v1-safetensors-26ebec8": Entry(_HEAD, (1,), _FIRST),
    "v1-two-ranks-1ffad4b": Entry("1ffad4b", (1,), _RANKS, ranks=2),
    "v1-two-ranks-26ebec8": Entry(_HEAD, (1,), _RANKS, ranks=2),
    "v1-named-613887f": Entry("613887f", (1,), _NAMED),
    "v2-planes-05a2d08": Entry("05a2d08", (2,), _PLANES),
    "v2-planes-26ebec8": Entry(_HEAD, (2,), _PLANES),
    "v2-split-2191ad3": Entry("2191ad3", (2,), _SPLIT, on_device=True),
    "v2-split-26ebec8": Entry(_HEAD, (2,), _SPLIT, on_device=True),
    "v2-codecs-05a2d08": Entry("05a2d08", (2,), _CODECS),
    "v2-codecs-26ebec8": Entry(_HEAD, (2,), _CODECS),
    "v2-zarr-05a2d08": Entry("05a2d08", (2,), _ZARR),
    "v2-zarr-26ebec8": Entry(_HEAD, (2,), _ZARR),
    "v2-delta-0266a1c": Entry("0266a1c", (2,), _CHAIN),
    "v2-delta-26ebec8": Entry(_HEAD, (2,), _CHAIN),
    "v2-two-ranks-1ffad4b": Entry("1ffad4b", (2,), _ENCODED, ranks=2),
    "v2-two-ranks-26ebec8": Entry(_HEAD, (2,), _ENCODED, ranks=2),
    "v3-dcp-e1fe1b1": Entry("e1fe1b1", (3,), _DCP, ranks=2, by_dcp=True),
    "v3-dcp-26ebec8": Entry(_HEAD, (3,), _DCP, ranks=2, by_dcp=True),
    "v3-boxes-6cc7b43": Entry("6cc7b43", (3,), _BOXES, ranks=2),
    "v3-boxes-26ebec8": Entry(_HEAD, (3,), _BOXES, ranks=2),
    "v4-values-93233c1": Entry("93233c1", (4,), _TYPED),
    "v4-wrapped-452f0d1": Entry("452f0d1", (4,), _WRAPPED),
    "v5-parts-9e01b23": Entry("9e01b23", (5,), _PARTS, ranks=2),
}


def write(name: str, path: Path) -> None:
    """Write the entry into the run directory ``path`` with the ``asyncckpt`` that is imported, and beside it
    ``<name>.json``, what it holds. The values come from the live states; nothing is read back."""
    import asyncckpt

    if not asyncckpt.__file__.startswith(os.getcwd() + os.sep):
        raise SystemExit(
            f"{asyncckpt.__file__} is imported: run this where the code lies that is to write, on PYTHONPATH"
        )
    entry = ENTRIES[name]
    if entry.ranks == 1:
        held = [_save_all(entry, path, 0)]
    else:
        held = _in_processes(name, entry, path)
    _tidy(path)
    saved = {
        str(save.step): {
            "kind": "weights" if save.weights_only else "full",
            "state": save.state,
            "tensors": _only_weights(save, _named(entry, save)),
            "alone": _only_weights(save, states.contents(states.build(save.state, save.step))),
            "ranks": [one[str(save.step)] for one in held] if entry.ranks > 1 else [],
        }
        for save in entry.saves
    }
    expected = {"commit": entry.commit, "versions": entry.versions, "by_dcp": entry.by_dcp, "steps": saved}
    path.with_name(f"{path.name}.json").write_text(json.dumps(expected, indent=1) + "\n")


def _named(entry: Entry, save: Save) -> dict[str, str]:
    """By qualified name; DCP's users call an optimizer ``optim``."""
    found = states.named_tensors(save.state, save.step)
    if not entry.by_dcp:
        return found
    return {
        f"optim.{key.removeprefix('optimizer.')}" if key.startswith("optimizer.") else key: text
        for key, text in found.items()
    }


def _only_weights(save: Save, found: dict[str, str]) -> dict[str, str]:
    return {key: text for key, text in found.items() if not save.weights_only or key.startswith("model.")}


def _save_all(entry: Entry, path: Path, rank: int) -> dict[str, Any]:
    """Every save of the entry, by this rank; what its state is at each."""
    held: dict[str, Any] = {}
    if entry.on_device:
        _take_the_processor_for_a_device()
    kept = contextlib.ExitStack()
    run: Any = None
    before: Mapping[str, Any] | None = None
    for save in entry.saves:
        state = states.build(save.state, save.step, rank, entry.ranks)
        held[str(save.step)] = _only_weights(save, states.contents(state))
        if entry.by_dcp:
            _save_by_dcp(path, save.step, state)
            continue
        if save.options != before:
            kept.close()
            run = kept.enter_context(checkpointer(path, save.options))
            before = save.options
        more = {"name": save.names} if save.names else {}  # older code knows no names
        run.save(save.step, state, metrics=METRICS, weights_only=save.weights_only, **more).result(60)
    kept.close()
    return held


def _take_the_processor_for_a_device() -> None:
    """Splitting is the same operations on every device, so that no GPU is needed to write what one would."""
    try:
        from asyncckpt.stage import job
    except ImportError:  # its name in older code
        from asyncckpt import staging as job  # type: ignore[attr-defined, no-redef]
    job._DEVICES = {"cpu"}


def checkpointer(path: Path, options: Mapping[str, Any]) -> Any:
    """A ``Checkpointer`` with the options of a ``Save``."""
    import asyncckpt

    options = dict(options)
    if "delta" in options:
        try:
            from asyncckpt import Delta
        except ImportError:  # its first version was not exported
            from asyncckpt.checkpointer import Delta  # type: ignore[attr-defined, no-redef]

        options["delta"] = Delta(chain=options["delta"])
    sizes = {"extent_bytes": EXTENT_BYTES, "shard_bytes": SHARD_BYTES}
    flat = sizes | options
    if not hasattr(asyncckpt, "Safetensors"):  # older code takes options one by one
        return asyncckpt.Checkpointer(path, config=CONFIG, **flat)
    more: dict[str, Any] = {}
    if "assets" in flat:
        more["assets"] = {name: text.encode() for name, text in flat.pop("assets").items()}
    writer = {"digest": flat.pop("digest")} if "digest" in flat else {}
    if "manifest_rows" in flat:
        more["ranks"] = asyncckpt.RankOptions(manifest_rows=flat.pop("manifest_rows"))
    if flat.pop("format", "safetensors") == "zarr":
        flat["chunk_bytes"] = flat.pop("extent_bytes")
        files: Any = asyncckpt.Zarr(**flat)
    else:
        files = asyncckpt.Safetensors(per_rank=flat.pop("layout", "global") == "ranks", **flat)
    return asyncckpt.Checkpointer(path, config=CONFIG, files=files, writer=asyncckpt.WriterOptions(**writer), **more)


def _save_by_dcp(path: Path, step: int, state: dict[str, Any]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    from asyncckpt.integrations.dcp import Writer

    weights, moments = get_state_dict(state["model"], state["optimizer"])
    plain = {"model": weights, "optim": moments, "meta": {"name": "golden", "sizes": [1, 2.5]}}
    dcp.save(plain, storage_writer=Writer(str(path), step=step))


def _in_processes(name: str, entry: Entry, path: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{rank}.json") for rank in range(entry.ranks)]
        commands = [
            [sys.executable, __file__, "rank", name, str(path), str(rank), str(port), str(file)]
            for rank, file in enumerate(files)
        ]
        processes = [subprocess.Popen(command) for command in commands]
        ended = [process.wait(180) for process in processes]  # every one of them, before anything is said
        if any(ended):
            raise SystemExit(f"{name}: a rank failed")
        return [json.loads(file.read_text()) for file in files]


def _rank(name: str, path: Path, rank: int, port: int, answer: Path) -> None:
    """One of an entry's ranks, in a process of its own."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    entry = ENTRIES[name]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=entry.ranks)
    answer.write_text(json.dumps(_save_all(entry, path, rank)))
    dist.barrier()
    dist.destroy_process_group()


def _tidy(path: Path) -> None:
    """Take away what tells of the process that wrote, and is no part of any checkpoint."""
    for file in [*path.glob(".asyncckpt-lease*"), *path.glob(".asyncckpt-journal*")]:
        file.unlink()
    left = [file.name for file in path.iterdir() if file.name.startswith(".")]
    if left:
        raise SystemExit(f"{path}: {left} was left")


def make_all() -> None:
    """Write the entries that are missing, each with its own commit."""
    root = HERE.parent.parent
    for name, entry in ENTRIES.items():
        if (HERE / name).exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            tree, out = Path(folder, "tree"), Path(folder, name)
            git = ["git", "-C", str(root), "worktree"]
            subprocess.run([*git, "add", "--quiet", "--detach", str(tree), entry.commit], check=True)
            try:
                command = [sys.executable, __file__, "write", name, str(out)]
                subprocess.run(command, check=True, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)})
            finally:
                subprocess.run([*git, "remove", "--force", str(tree)], check=True)
            shutil.copytree(out, HERE / name)  # links become files, as they do in git
            shutil.copy(out.with_name(f"{name}.json"), HERE)


def main(arguments: list[str]) -> None:
    """``all``, ``write NAME OUT``, or, as ``write`` itself starts them, ``rank …``."""
    # a manifest says where it was made; that is nobody's business here
    socket.gethostname = lambda: "golden"
    platform.platform = lambda *_, **__: "Linux"
    match arguments:
        case ["all"]:
            make_all()
        case ["write", name, out]:
            write(name, Path(out))
        case ["rank", name, out, rank, port, answer]:
            _rank(name, Path(out), int(rank), int(port), Path(answer))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
