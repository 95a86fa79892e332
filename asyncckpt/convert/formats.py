"""The formats that checkpoints come from and go to are known here by name, and by what their files look like."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from asyncckpt.codecs import digests
from asyncckpt.convert.exporting import Exported, ExportOptions, Writer, export_with
from asyncckpt.convert.importing import Imported, import_source, renamed_source
from asyncckpt.convert.selection import Selection
from asyncckpt.convert.source import Progress, Source
from asyncckpt.errors import CheckpointNotFound, InvalidOption
from asyncckpt.read.opening import OpenCheckpoint

if TYPE_CHECKING:
    import torch

_SUFFIXES: Final = {
    ".safetensors": "safetensors",
    ".safetensors.index.json": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".ckpt": "torch",
    ".bin": "torch",
    ".gguf": "gguf",
    ".onnx": "onnx",
    ".zarr": "zarr",
}


def _safetensors(path: str) -> Source:
    from asyncckpt.convert.safetensors_files import read_safetensors

    return read_safetensors(path)


def _torch(path: str) -> Source:
    from asyncckpt.convert.torch_file import read_torch_file

    return read_torch_file(path)


def _hf(path: str) -> Source:
    from asyncckpt.convert.huggingface import read_model_directory

    return read_model_directory(path)


def _peft(path: str) -> Source:
    from asyncckpt.convert.huggingface import read_adapter_directory

    return read_adapter_directory(path)


def _gguf(path: str) -> Source:
    from asyncckpt.convert.gguf_file import read_gguf

    return read_gguf(path)


def _onnx(path: str) -> Source:
    from asyncckpt.convert.onnx_file import read_onnx

    return read_onnx(path)


def _zarr(path: str) -> Source:
    from asyncckpt.convert.zarr_groups import read_zarr

    return read_zarr(path)


def _deepspeed(path: str) -> Source:
    from asyncckpt.convert.deepspeed_zero import read_zero

    return read_zero(path)


def _tensorflow(path: str) -> Source:
    from asyncckpt.convert.tensorflow_files import read_tensorflow

    return read_tensorflow(path)


#: Each reads one format; it imports what it needs when it is called.
READERS: Final[dict[str, Callable[[str], Source]]] = {
    "safetensors": _safetensors,
    "torch": _torch,
    "hf": _hf,
    "peft": _peft,
    "gguf": _gguf,
    "onnx": _onnx,
    "zarr": _zarr,
    "deepspeed": _deepspeed,
    "tensorflow": _tensorflow,
}


def _to_safetensors() -> Writer:
    from asyncckpt.convert.safetensors_out import write_file

    return Writer(write_file)


def _to_safetensors_folder() -> Writer:
    from asyncckpt.convert.safetensors_out import write_folder

    return Writer(write_folder, folder=True)


def _to_torch() -> Writer:
    from asyncckpt.convert.torch_out import write_torch_file

    return Writer(write_torch_file, trees=True)


def _to_hf() -> Writer:
    from asyncckpt.convert.huggingface_out import choose_model, write_model_directory

    return Writer(write_model_directory, folder=True, choose=choose_model)


def _to_peft() -> Writer:
    from asyncckpt.convert.huggingface_out import choose_adapter, write_adapter_directory

    return Writer(write_adapter_directory, folder=True, trees=True, choose=choose_adapter)


def _to_dcp() -> Writer:
    from asyncckpt.convert.dcp.directory import write_dcp_directory

    return Writer(write_dcp_directory, folder=True, trees=True)


def _to_gguf() -> Writer:
    from asyncckpt.convert.gguf_out import write_gguf

    return Writer(write_gguf)


def _to_onnx() -> Writer:
    from asyncckpt.convert.onnx_out import write_onnx

    return Writer(write_onnx)


def _to_zarr() -> Writer:
    from asyncckpt.convert.zarr_groups import write_zarr

    return Writer(write_zarr, folder=True)


def _to_tensorflow() -> Writer:
    from asyncckpt.convert.tensorflow_files import write_tensorflow

    return Writer(write_tensorflow, folder=True)


#: Each returns what writes one format.
WRITERS: Final[dict[str, Callable[[], Writer]]] = {
    "safetensors": _to_safetensors,
    "safetensors-shards": _to_safetensors_folder,
    "torch": _to_torch,
    "hf": _to_hf,
    "peft": _to_peft,
    "dcp": _to_dcp,
    "gguf": _to_gguf,
    "onnx": _to_onnx,
    "zarr": _to_zarr,
    "tensorflow": _to_tensorflow,
}


def import_checkpoint(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    step: int,
    *,
    format: str | None = None,
    component: str | None = None,
    selection: Selection | None = None,
    overwrite: bool = False,
    digest: str = digests.DEFAULT,
    metrics: Mapping[str, float] | None = None,
    progress: Progress = lambda _what, _done, _total: None,
) -> Imported:
    """Write a file or directory of another format into the run directory ``run`` as ``step``.

    ``format`` is one of ``READERS``, and is found out by default. ``component`` names the module that the tensors
    become, where the source has one module (default: ``model``). ``selection`` chooses and renames tensors, and says
    what may be left behind. ``overwrite`` replaces a checkpoint of the same step. ``digest``: the algorithm that
    proves the new files' bytes, as in ``WriterOptions``. ``metrics`` go into the manifest. ``progress(what, done_bytes,
    total_bytes)`` is called on several threads.

    Nothing that a pickle names is executed. The manifest records where the checkpoint came from, with a digest of each
    file. Raises ``UnsupportedValue`` for what a checkpoint cannot hold and ``selection`` does not drop,
    ``CheckpointDamaged`` where the source does not fit together, ``CheckpointNotFound``, ``InvalidOption``,
    ``MissingExtra``, ``StepExists`` and ``RunLocked``. Blocks until the checkpoint is durable; tensors are read as they
    are written, in extents of 8 MiB.
    """
    path = os.fspath(source)
    if (format or detect(path)) == "dcp":
        if component is not None:
            raise InvalidOption("a checkpoint of torch.distributed.checkpoint names its components itself: use rename")
        return _import_dcp(path, run, step, selection, overwrite, digest, metrics, progress)
    with open_source(path, format) as opened:
        if component is not None:
            renamed_source(opened, component)
        return import_source(
            opened,
            run,
            step,
            selection=selection,
            overwrite=overwrite,
            digest=digest,
            metrics=metrics,
            progress=progress,
        )


def _import_dcp(
    path: str,
    run: str | os.PathLike[str],
    step: int,
    selection: Selection | None,
    overwrite: bool,
    digest: str,
    metrics: Mapping[str, float] | None,
    progress: Progress,
) -> Imported:
    """Import a directory of plain DCP, whose tensors stay the boxes that they were saved in."""
    from asyncckpt.convert.dcp.conversion import convert

    done = convert(
        path, run, step, overwrite=overwrite, digest=digest, metrics=metrics, selection=selection, progress=progress
    )
    note = "each dict of the state became a component; dcp.load reads it with asyncckpt.integrations.dcp.Reader"
    return Imported(done.path, step, done.tensors, done.nbytes, {}, done.skipped, (note,), done.source)


def open_source(path: str, format: str | None = None) -> Source:
    """Open a file or directory for importing. Raises as ``import_checkpoint`` does."""
    chosen = format or detect(path)
    if chosen not in READERS:
        raise InvalidOption(f"format {chosen!r} cannot be imported; formats are {', '.join(READERS)}")
    return READERS[chosen](path)


def detect(path: str) -> str:
    """Return the format of what lies at ``path``. Raises ``CheckpointNotFound``, and ``InvalidOption`` for what looks
    like none that is known."""
    if os.path.isdir(path):
        found = _of_directory(path)
    elif os.path.lexists(path):
        found = next((name for suffix, name in _SUFFIXES.items() if path.endswith(suffix)), None)
    elif os.path.isfile(f"{path}.index"):
        found = "tensorflow"
    else:
        raise CheckpointNotFound(f"{path}: no such file or directory")
    if found is None:
        raise InvalidOption(f"{path} looks like no format that is known; name it with --format ({', '.join(READERS)})")
    return found


def _names_zero(path: str, names: set[str]) -> bool:
    """Return whether the file ``latest`` of a directory names one of DeepSpeed's."""
    if "latest" not in names or not os.path.isfile(os.path.join(path, "latest")):
        return False
    with open(os.path.join(path, "latest"), "rb") as file:
        tag = file.read(4096).decode("utf-8", "replace").strip()
    return tag in names and any(name.endswith("_optim_states.pt") for name in os.listdir(os.path.join(path, tag)))


def _of_directory(path: str) -> str | None:
    names = set(os.listdir(path))
    if ".metadata" in names:
        return "dcp"
    if "adapter_config.json" in names:
        return "peft"
    if "config.json" in names and any(name.endswith((".safetensors", ".bin", ".index.json")) for name in names):
        return "hf"
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return "safetensors"
    if any(name.endswith("_optim_states.pt") for name in names) or _names_zero(path, names):
        return "deepspeed"
    if any(name.endswith(".index") and f"{name[:-6]}.data-00000-of-" in " ".join(names) for name in names):
        return "tensorflow"
    return "zarr" if "zarr.json" in names else None


def export_checkpoint(
    checkpoint: OpenCheckpoint,
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    what: str = "weights",
    dtype: torch.dtype | None = None,
    selection: Selection | None = None,
    overwrite: bool = False,
    progress: Progress = lambda _what, _done, _total: None,
    options: ExportOptions | None = None,
) -> Exported:
    """Write what is chosen of an open checkpoint to ``out``, a file or a new directory.

    ``format`` is one of ``WRITERS``, and by default what the ending of ``out`` says. ``what`` is ``weights`` (the
    modules; names lack the component where there is one module), ``all``, or one component's name. ``dtype`` converts
    floating tensors, rounded to the nearest, ties to even; a value that would become infinite is refused. ``selection``
    chooses and renames tensors, and says what may be lost. ``overwrite`` replaces an existing file.
    ``progress(what, done_bytes, total_bytes)`` is called on several threads.

    Every byte read is verified, and the result appears whole or not at all, fsynced. It records the checkpoint and the
    digest of its manifest: among the format's own metadata, or in ``asyncckpt.json`` beside the rest. Tensors are
    written as they are read, in extents of 8 MiB. Blocks. Raises ``InvalidOption``, ``UnsupportedValue`` for what would
    be lost, ``RunPathError`` (``out`` exists, or cannot be written), ``NotEnoughSpace``, ``MissingExtra`` and
    ``CheckpointDamaged``.
    """
    chosen = format or format_of(out)
    if chosen not in WRITERS:
        raise InvalidOption(f"format {chosen!r} cannot be exported to; formats are {', '.join(WRITERS)}")
    return export_with(
        WRITERS[chosen](),
        chosen,
        checkpoint,
        out,
        what=what,
        dtype=dtype,
        selection=selection,
        overwrite=overwrite,
        progress=progress,
        options=options,
    )


def format_of(out: str | os.PathLike[str]) -> str:
    """Return the format that the ending of a name says. Raises ``InvalidOption``."""
    name = os.fspath(out)
    found = next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)
    if found is None or name.endswith(".index.json"):
        raise InvalidOption(
            f"{name}: export to a name that ends in .safetensors, .pt, .pth or .ckpt, or name the format with --format "
            f"({', '.join(WRITERS)})"
        )
    return found
