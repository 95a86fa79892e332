"""``export`` makes one file of a checkpoint that other tools take: plain safetensors, or a ``.pt`` for
``torch.load``."""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged, InvalidOption, RunPathError
from asyncckpt.manifest.records import Manifest
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.restore.restore import load_tensors
from asyncckpt.storage import local_path
from asyncckpt.storage.posix import PosixOps

What = Literal["weights", "all"]


def export(
    checkpoint: OpenCheckpoint,
    out: str | os.PathLike[str],
    *,
    what: What | str = "weights",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> int:
    """Write an open checkpoint to ``out`` (``.safetensors`` or ``.pt``), and return the file's size in bytes.

    ``what`` is ``weights`` (the modules; names lack the component where there is one module), ``all``, or one
    component's name. ``dtype`` converts floating tensors. ``overwrite`` replaces an existing file. Every byte read is
    verified, and the file appears whole or not at all, fsynced.

    A ``.pt`` of weights or of one module is a flat ``state_dict`` that opens with ``weights_only=True``. A ``.pt`` of
    another component is its state, the optimizer's by parameter name. A ``.pt`` of ``all`` holds ``{component:
    state}``, with ``step`` and ``metrics`` beside them where no component has that name. A ``.safetensors`` holds
    tensors alone, a tied one once.

    Raises ``InvalidOption``, ``RunPathError`` (the file exists, or cannot be written) and ``CheckpointDamaged``.
    Blocks, and holds the exported tensors in memory.
    """
    target = Path(local_path(out))
    if target.suffix not in (".safetensors", ".pt"):
        raise InvalidOption(f"{target}: export to a name that ends in .safetensors or .pt")
    if not target.parent.is_dir():
        raise RunPathError(f"{target}: the directory {target.parent} does not exist; create it, or choose another path")
    if target.is_dir() or (os.path.lexists(target) and not overwrite):
        raise _exists(target)
    checkpoint.check_small_files()
    manifest = checkpoint.manifest
    components = _components(manifest, what, checkpoint.path)
    if target.suffix == ".pt":
        content: Any = _objects(checkpoint, components, what, dtype)
    else:
        tensors = _tensors(checkpoint, components, dtype)
        content = _flat(manifest, components, tensors, drop_aliases=True)
        if not content:
            raise InvalidOption(f"{checkpoint.path}: {what!r} has no tensors; export it to a .pt")
        for name in content:
            if name == "__metadata__" or any("\ud800" <= char <= "\udfff" for char in name):
                raise InvalidOption(
                    f"{checkpoint.path}: safetensors has no room for the name {name!r:.80}; export to a .pt"
                )
    return _write(target, content, overwrite)


def _components(manifest: Manifest, what: str, path: str) -> list[str]:
    if what == "all":
        return list(manifest.components)
    if what == "weights":
        found = [name for name, record in manifest.components.items() if record.kind == "module"]
    else:
        found = [name for name in manifest.components if name == what]
    if not found:
        raise InvalidOption(f"{path}: nothing to export as {what!r}; components are {', '.join(manifest.components)}")
    return found


def _tensors(checkpoint: OpenCheckpoint, components: list[str], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    wanted = [name for name in components if checkpoint.manifest.components[name].tensors]
    return load_tensors(checkpoint, wanted, dtype=dtype) if wanted else {}


def _flat(
    manifest: Manifest, components: list[str], tensors: dict[str, torch.Tensor], *, drop_aliases: bool
) -> dict[str, torch.Tensor]:
    """Return the tensors by name, without the component where there is only one. ``drop_aliases``: safetensors refuses
    tensors that share memory."""
    flat: dict[str, torch.Tensor] = {}
    for component in components:
        record = manifest.components[component]
        names = list(record.tensors) + ([] if drop_aliases else list(record.aliases))
        for name in names:
            flat[name if len(components) == 1 else f"{component}.{name}"] = tensors[f"{component}.{name}"]
    return flat


def _objects(checkpoint: OpenCheckpoint, components: list[str], what: str, dtype: torch.dtype | None) -> Any:
    manifest = checkpoint.manifest
    tensors = _tensors(checkpoint, components, dtype)
    kinds = {manifest.components[component].kind for component in components}
    if what != "all" and kinds == {"module"}:
        return _flat(manifest, components, tensors, drop_aliases=False)
    trees = checkpoint.trees

    @functools.cache
    def exact() -> dict[str, torch.Tensor]:  # numpy lacks some dtypes, and its arrays are data, not weights
        return tensors if dtype is None else _tensors(checkpoint, components, None)

    def state(component: str) -> Any:
        record = manifest.components[component]
        if record.kind == "module":
            return {name: tensors[f"{component}.{name}"] for name in (*record.tensors, *record.aliases)}

        def of(loaded: Callable[[], dict[str, torch.Tensor]]) -> Callable[[str], torch.Tensor]:
            def get(name: str) -> torch.Tensor:
                found = loaded().get(f"{component}.{name}")
                if found is None:
                    raise CheckpointDamaged(f"{checkpoint.path}: state.json refers to {name!r:.80}, which is not there")
                return found

            return get

        if component not in trees:
            raise CheckpointDamaged(f"{checkpoint.path}: state.json lacks the component {component!r}")
        return jsontree.decode(trees[component], of(lambda: tensors), of(exact))

    if what != "all":
        return state(components[0])
    return {"step": manifest.step, "metrics": dict(manifest.metrics)} | {name: state(name) for name in components}


def _exists(target: Path) -> RunPathError:
    return RunPathError(f"{target} exists; choose another name, or overwrite it on purpose (--force, overwrite=True)")


def _write(target: Path, content: Any, overwrite: bool) -> int:
    temp = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    ops = PosixOps()
    try:
        temp.touch()
        # the umask gives this mode; safetensors makes files that nobody else can read
        mode = temp.stat().st_mode & 0o7777
        _serialize(content, temp, torch_file=target.suffix == ".pt")
        temp.chmod(mode)
        with temp.open("rb") as file:
            os.fsync(file.fileno())
        nbytes = temp.stat().st_size
        if overwrite:
            ops.replace(str(temp), str(target))
        else:
            ops.rename_noreplace(str(temp), str(target))
        ops.fsync_directory(str(target.parent))
    except BaseException as error:
        with contextlib.suppress(OSError):
            temp.unlink()
        if isinstance(error, FileExistsError):
            raise _exists(target) from error
        if isinstance(error, OSError):
            raise RunPathError(f"{target}: cannot write here ({error}); choose another path") from error
        raise
    return nbytes


def _serialize(content: Any, path: Path, *, torch_file: bool) -> None:
    """Write the file. Raises ``OSError`` where the disk refuses; the two libraries raise other errors then."""
    try:
        if torch_file:
            torch.save(content, path)
        else:
            save_file(content, path, metadata={"format": "pt"})
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error).partition("\n")[0]) from error
