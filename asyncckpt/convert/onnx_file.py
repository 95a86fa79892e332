"""ONNX in: the initializers of a model, by name, from the file itself or from the files beside it."""

from __future__ import annotations

import os
from typing import Any, Final

from asyncckpt.convert.source import Source, module
from asyncckpt.convert.tensors import FileTensor, Holder, LoadedTensor, SourceTensor
from asyncckpt.errors import CheckpointDamaged, MissingExtra
from asyncckpt.formats.safetensors import tensor_nbytes

#: ONNX's numbers of data types, by safetensors codes.
TYPES: Final = {
    "F32": 1,
    "U8": 2,
    "I8": 3,
    "U16": 4,
    "I16": 5,
    "I32": 6,
    "I64": 7,
    "BOOL": 9,
    "F16": 10,
    "F64": 11,
    "U32": 12,
    "U64": 13,
    "C64": 14,
    "BF16": 16,
    "F8_E4M3": 17,
    "F8_E4M3FNUZ": 18,
    "F8_E5M2": 19,
    "F8_E5M2FNUZ": 20,
}
CODES: Final = {number: code for code, number in TYPES.items()}


def onnx() -> Any:
    """Return the library. Raises ``MissingExtra``."""
    try:
        import onnx as library
        import onnx.external_data_helper
        import onnx.numpy_helper
    except ImportError as error:
        raise MissingExtra("ONNX needs onnx: pip install 'asyncckpt[onnx]'") from error
    return library


def read_onnx(path: str) -> Source:
    """Open an ONNX model: its initializers become the module ``model``. The graph itself is no state and is not kept.
    Raises ``CheckpointDamaged`` and ``MissingExtra``.

    What lies in the model's own file, at most 2 GiB, is in memory; external data is not."""
    library = onnx()
    source = Source("onnx", path)
    try:
        source.open_file(path)
        try:
            model = library.load(path, load_external_data=False)
        except Exception as error:  # of the protocol buffers
            raise CheckpointDamaged(f"{path} is no ONNX model that can be read ({error!s:.200})") from error
        tensors: dict[str, SourceTensor] = {}
        holder = Holder()
        for one in model.graph.initializer:
            if one.data_type not in CODES:
                kind = library.TensorProto.DataType.Name(one.data_type)
                source.lost[one.name] = f"a tensor of {kind}, for which safetensors has no name"
            elif one.name in tensors:
                raise CheckpointDamaged(f"{path}: two initializers are called {one.name!r:.80}")
            else:
                tensors[one.name] = _tensor(library, source, path, one, holder)
        if model.graph.sparse_initializer:
            for one in model.graph.sparse_initializer:
                source.lost[one.values.name] = "a sparse tensor"
    except BaseException:
        source.close()
        raise
    source.components = [module("model", tensors)]
    source.notes.append(f"{len(tensors)} initializers became the module 'model'; the graph is not kept")
    return source


def _tensor(library: Any, source: Source, path: str, one: Any, holder: Holder) -> SourceTensor:
    code, shape = CODES[one.data_type], tuple(one.dims)
    if any(size < 0 for size in shape):
        raise CheckpointDamaged(f"{path}: {one.name!r:.80} has a malformed shape")
    nbytes = tensor_nbytes(code, shape)
    if one.data_location == library.TensorProto.EXTERNAL:
        return _external(source, path, one, code, nbytes)
    if one.HasField("raw_data") and len(one.raw_data) != nbytes:
        raise CheckpointDamaged(f"{path}: {one.name!r:.80} has {len(one.raw_data)} bytes, and needs {nbytes}")

    def load() -> Any:
        if one.HasField("raw_data"):
            import numpy as np

            return np.frombuffer(one.raw_data, np.uint8)
        return library.numpy_helper.to_array(one)

    return LoadedTensor(code, shape, load, holder)


def _external(source: Source, path: str, one: Any, code: str, nbytes: int) -> SourceTensor:
    """Return a tensor that lies in a file beside the model; one that lies elsewhere is refused."""
    about = {entry.key: entry.value for entry in one.external_data}
    name = about.get("location", "")
    parts = name.split("/")
    if not name or name.startswith("/") or ".." in parts or "\0" in name:
        raise CheckpointDamaged(f"{path}: {one.name!r:.80} lies in {name!r:.80}, which is not beside the model")
    try:
        offset, length = int(about.get("offset", "0")), int(about.get("length", nbytes))
    except ValueError as error:
        raise CheckpointDamaged(f"{path}: {one.name!r:.80} lies at no number") from error
    file = os.path.join(os.path.dirname(path), *parts)
    if os.path.islink(file):
        raise CheckpointDamaged(f"{file} is a link, and none is followed")
    opened = source.open_file(file)
    if length != nbytes or not 0 <= offset <= offset + nbytes <= opened.nbytes:
        raise CheckpointDamaged(f"{path}: {one.name!r:.80} has not the bytes that it says in {name!r:.80}")
    return FileTensor(code, tuple(one.dims), opened, offset, file)
