"""A checkpoint as one file other tools take: plain safetensors, or a ``.pt`` for ``torch.load``."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any, Literal

import torch

from asyncckpt import plain
from asyncckpt.errors import InvalidOption, RunPathError
from asyncckpt.manifest import Manifest
from asyncckpt.protocols import Reader
from asyncckpt.restore import load_tensors, open_manifest, read_trees

What = Literal["weights", "all"]


def export(
    reader: Reader,
    out: str | os.PathLike[str],
    *,
    what: What | str = "weights",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> int:
    """Write an open checkpoint to ``out`` (``.safetensors`` or ``.pt``); the file's size in bytes.

    ``what``: ``weights`` (the modules; names without the component where there is one module), ``all``, or one
    component's name. ``dtype`` converts floating tensors. Every byte read is verified, and the file appears whole or
    not at all. A ``.pt`` of weights opens with ``weights_only=True``; of ``all`` it holds ``{component: state}`` with
    plain values and the optimizer's state by parameter name. A ``.safetensors`` of ``all`` holds the tensors alone.

    Raises ``InvalidOption``, ``RunPathError`` (the file exists, or cannot be written) and ``CheckpointDamaged``.
    Blocks; holds the exported tensors in memory.
    """
    target = Path(out)
    if target.suffix not in (".safetensors", ".pt"):
        raise InvalidOption(f"{target}: export to a name that ends in .safetensors or .pt")
    if target.exists() and not overwrite:
        raise RunPathError(f"{target} exists; choose another name, or overwrite it on purpose")
    manifest = open_manifest(reader)
    components = _components(manifest, what, reader.path)
    tensors = load_tensors(reader, components, dtype=dtype) if _has_tensors(manifest, components) else {}
    if target.suffix == ".pt":
        content: Any = _objects(reader, manifest, components, tensors, what)
    else:
        content = _flat(manifest, components, tensors, drop_aliases=True)
    return _write(target, content)


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


def _has_tensors(manifest: Manifest, components: list[str]) -> bool:
    return any(manifest.components[name].tensors for name in components)


def _flat(
    manifest: Manifest, components: list[str], tensors: dict[str, torch.Tensor], *, drop_aliases: bool
) -> dict[str, torch.Tensor]:
    """By name, without the component where there is only one. Safetensors refuses tensors that share memory."""
    flat: dict[str, torch.Tensor] = {}
    for component in components:
        record = manifest.components[component]
        names = list(record.tensors) + ([] if drop_aliases else list(record.aliases))
        for name in names:
            flat[name if len(components) == 1 else f"{component}.{name}"] = tensors[f"{component}.{name}"]
    return flat


def _objects(
    reader: Reader, manifest: Manifest, components: list[str], tensors: dict[str, torch.Tensor], what: str
) -> Any:
    if what == "weights":
        return _flat(manifest, components, tensors, drop_aliases=False)
    trees = read_trees(reader, manifest)
    objects: dict[str, Any] = {"step": manifest.step, "metrics": dict(manifest.metrics)} if what == "all" else {}
    for component in components:
        record = manifest.components[component]
        if record.kind == "module":
            names = [*record.tensors, *record.aliases]
            objects[component] = {name: tensors[f"{component}.{name}"] for name in names}
        else:
            by_name = {name: tensors[f"{component}.{name}"] for name in record.tensors}
            objects[component] = plain.decode(trees[component], by_name.__getitem__)
    return objects


def _write(target: Path, content: Any) -> int:
    temp = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        if target.suffix == ".pt":
            torch.save(content, temp)
        else:
            from safetensors.torch import save_file

            save_file({name: tensor.contiguous() for name, tensor in content.items()}, temp, metadata={"format": "pt"})
            umask = os.umask(0)
            os.umask(umask)
            temp.chmod(0o666 & ~umask)  # that library writes files nobody else can read
        with temp.open("rb") as file:
            os.fsync(file.fileno())
        nbytes = temp.stat().st_size
        temp.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise RunPathError(f"{target}: cannot write here ({error}); choose another path") from error
    return nbytes
