"""ONNX out: the graph of a module with the checkpoint's weights, or tensors as initializers by name."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any, Final

from asyncckpt.convert.exporting import Export
from asyncckpt.convert.onnx_file import TYPES, onnx
from asyncckpt.convert.stored import Place, StoredItem, check_overflow, fill_places, origin, view_at, whole
from asyncckpt.errors import InvalidOption, MissingExtra
from asyncckpt.restore.restore import restore

#: Tensors of so many bytes and more lie in a file beside the model, which can have 2 GiB at most.
_EXTERNAL_BYTES: Final = 1 << 20
_EMBEDDED_BYTES: Final = 256 << 20
_ALIGNMENT: Final = 4096
_IR_VERSION: Final = 10
_OPSET: Final = 21


def write_onnx(job: Export) -> None:
    """Write a model. With ``options.module`` its graph is written, with the checkpoint's weights; without it the
    tensors are initializers, which are the model's outputs, too, each under all of its names. Large ones lie in
    ``TARGET.data`` beside it. Raises ``InvalidOption`` and ``MissingExtra``."""
    library = onnx()
    if job.options.module is not None:
        _write_graph(job, library)
        return
    items = job.items
    total = sum(item.nbytes for item in items)
    external = [item for item in items if item.nbytes >= _EXTERNAL_BYTES] if total > _EMBEDDED_BYTES else []
    data = job.output.beside(".data") if external else None
    offsets = _write_external(job, external, data) if data is not None else {}
    tensors, outputs = [], []
    for item in items:
        tensor = library.TensorProto(name=item.name, data_type=TYPES[item.dtype], dims=item.shape)
        if item.name in offsets and data is not None:
            tensor.data_location = library.TensorProto.EXTERNAL
            about = {"location": f"{job.output.target.name}.data", "offset": offsets[item.name], "length": item.nbytes}
            for key, value in about.items():
                tensor.external_data.add(key=key, value=str(value))
        else:
            tensor.raw_data = _bytes(job, item)
        tensors.append(tensor)
        outputs.append(library.helper.make_tensor_value_info(item.name, TYPES[item.dtype], item.shape))
    graph = library.helper.make_graph([], "weights", [], outputs, initializer=tensors)
    model = library.helper.make_model(graph, producer_name="asyncckpt")
    model.ir_version = _IR_VERSION
    del model.opset_import[:]
    model.opset_import.add(domain="", version=_OPSET)
    _add_origin(model, job)
    Path(job.output.inside("")).write_bytes(model.SerializeToString())


def _write_external(job: Export, items: list[StoredItem], path: Path) -> dict[str, int]:
    offsets: dict[str, int] = {}
    at = 0
    for item in items:
        offsets[item.name] = at
        at += -(-item.nbytes // _ALIGNMENT) * _ALIGNMENT
    memory = job.output.mapped(path, at)
    placed = [(item, view_at(memory, offsets[item.name], item.dtype, item.shape)) for item in items]
    fill_places(job.checkpoint, [Place(item.record, view) for item, view in placed], job.progress)
    check_overflow(job.checkpoint, placed)
    return offsets


def _bytes(job: Export, item: StoredItem) -> bytes:
    import torch

    tensor = whole(job.checkpoint, item)
    check_overflow(job.checkpoint, [(item, tensor)])
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _add_origin(model: Any, job: Export) -> None:
    for key, value in origin(job.checkpoint).items():
        model.metadata_props.add(key=key, value=value)


def _write_graph(job: Export, library: Any) -> None:
    """Write the module's graph with the checkpoint's weights; the module itself is left as it is."""
    import torch

    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra("a module's graph needs onnxscript: pip install 'asyncckpt[onnx]'") from error
    if len(job.components) != 1:
        raise InvalidOption(f"{job.checkpoint.path}: a graph has the weights of one module; choose it with what=")
    module = copy.deepcopy(job.options.module)
    assert module is not None
    restore(job.checkpoint, {job.components[0]: module}, dtype=job.dtype)
    if job.dtype is not None:
        module = module.to(job.dtype)
    path = Path(job.output.inside(""))
    data = job.output.beside(".data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module.eval(), job.options.inputs, dynamo=True, verbose=False)
    if program is None:
        raise InvalidOption("torch could not make a graph of the module")
    model = program.model_proto
    _add_origin(model, job)
    large = sum(len(one.raw_data) for one in model.graph.initializer) > _EMBEDDED_BYTES
    if large:
        library.external_data_helper.convert_model_to_external_data(
            model, all_tensors_to_one_file=True, location=data.name, size_threshold=_EXTERNAL_BYTES
        )
        library.external_data_helper.write_external_data_tensors(model, str(path.parent))
        for one in model.graph.initializer:
            for entry in one.external_data:
                if entry.key == "location":
                    entry.value = f"{job.output.target.name}.data"
    path.write_bytes(model.SerializeToString())
    if not large and os.path.lexists(data):
        os.unlink(data)
