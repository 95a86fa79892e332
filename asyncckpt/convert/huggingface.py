"""Model directories of Transformers and adapter directories of PEFT in: weights, and the small files beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from asyncckpt.convert import safetensors_files, torch_file
from asyncckpt.convert.source import Source, SourceComponent, module
from asyncckpt.convert.tensors import SourceTensor
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound

CONFIG: Final = "config.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
#: Weights that are there in safetensors, too, in the formats of other frameworks.
_OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".safetensors")
#: A trainer keeps these beside a model; they are pickles of its own.
_STATE: Final = ("optimizer", "scheduler", "rng_state", "scaler", "training_args")
_SMALL_BYTES: Final = 128 << 20


def read_model_directory(path: str) -> Source:
    """Open a directory that ``save_pretrained`` of Transformers wrote. The small files become assets. Raises
    ``CheckpointNotFound`` and ``CheckpointDamaged``."""
    source = Source("hf", path)
    try:
        tensors = _weights(source, path, "model", "pytorch_model")
        config = _json(source, os.path.join(path, CONFIG))
        _take_files(source, path)
        added = _add_tied(tensors, config, source)
    except BaseException:
        source.close()
        raise
    source.components = [module("model", tensors)]
    kind = ", ".join(config.get("architectures") or ()) or config.get("model_type") or "a model"
    source.notes.append(f"{kind}: {len(tensors)} tensors became the module 'model'{added}")
    source.notes.append(f"assets: {', '.join(sorted(source.assets)) or 'none'}")
    return source


def read_adapter_directory(path: str) -> Source:
    """Open a directory that ``save_pretrained`` of PEFT wrote: it becomes what ``integrations.peft.Adapters`` saves.
    Raises as ``read_model_directory`` does."""
    source = Source("peft", path)
    try:
        config = _json(source, os.path.join(path, ADAPTER_CONFIG))
        kind = config.get("peft_type")
        if not isinstance(kind, str):
            raise CheckpointDamaged(f"{path}/{ADAPTER_CONFIG} lacks peft_type")
        tensors = _weights(source, path, "adapter_model", "adapter_model")
        _take_files(source, path)
    except BaseException:
        source.close()
        raise
    value: dict[str, Any] = {**tensors, "adapter": {"name": "default", "kind": kind}}
    source.components = [SourceComponent("adapter", "module", value, file=ADAPTER_WEIGHTS)]
    source.notes.append(f"{kind}: {len(tensors)} tensors became the module 'adapter', as integrations.peft.Adapters")
    return source


def _weights(source: Source, folder: str, stem: str, old_stem: str) -> dict[str, SourceTensor]:
    """Return the weights of a directory: those in safetensors, or else those that ``torch.save`` wrote."""
    for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
        if os.path.lexists(os.path.join(folder, name)):
            return safetensors_files.tensors_at(source, os.path.join(folder, name))
    index = os.path.join(folder, f"{old_stem}.bin.index.json")
    if os.path.lexists(index):
        places = safetensors_files.weight_map(source, index)
        found: dict[str, SourceTensor] = {}
        for file in dict.fromkeys(places.values()):
            found |= _of_torch(source, os.path.join(folder, file))
        missing = [name for name in places if name not in found]
        if missing:
            raise CheckpointDamaged(f"{index} lists {missing[0]!r:.80} ({len(missing)} in all), which no file has")
        return found
    if os.path.lexists(os.path.join(folder, f"{old_stem}.bin")):
        return _of_torch(source, os.path.join(folder, f"{old_stem}.bin"))
    raise CheckpointNotFound(f"{folder}: no {stem}.safetensors, no index and no {old_stem}.bin in it")


def _of_torch(source: Source, path: str) -> dict[str, SourceTensor]:
    content = torch_file.content_of(source, path)
    if not isinstance(content, Mapping):
        raise CheckpointDamaged(f"{path} should be a dict of tensors, and is a {type(content).__name__}")
    found = {str(name): value for name, value in content.items() if isinstance(value, SourceTensor)}
    source.lost.update({str(name): "no tensor" for name in content if str(name) not in found})
    return found


def _json(source: Source, path: str) -> dict[str, Any]:
    try:
        found = json.loads(source.read_small(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{path} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointDamaged(f"{path} is no JSON object")
    return found


def _take_files(source: Source, folder: str) -> None:
    """Take the small files of a directory as assets, and say what is left out."""
    left: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda one: one.name):
        name = entry.name
        if name.startswith("."):
            continue
        if not entry.is_file():
            left.append(f"{name}/")
        elif name.endswith(_OTHER_WEIGHTS):
            if name.startswith(_STATE):
                source.lost[name] = "a pickle of a trainer beside the model"
            elif not name.endswith(".safetensors"):
                left.append(name)
        elif name.endswith(".index.json"):
            continue
        elif entry.stat().st_size > _SMALL_BYTES:
            source.lost[name] = "a large file beside the model"
        else:
            source.assets[name] = source.read_small(os.path.join(folder, name), _SMALL_BYTES)
    if left:
        source.notes.append(f"not taken: {', '.join(left)}")


def _add_tied(tensors: dict[str, SourceTensor], config: Mapping[str, Any], source: Source) -> str:
    """Give tied weights, which such a directory has once, their other names, where Transformers says which they are."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        source.notes.append("Transformers is not installed, so tied weights have one name")
        return ""
    names = tied_names(json.dumps(config).encode())
    added = [name for name, owner in names.items() if name not in tensors and owner in tensors]
    for name in added:
        tensors[name] = tensors[names[name]]
    return f", {', '.join(added)} tied" if added else ""


def tied_names(config: bytes) -> dict[str, str]:
    """Return the names of tied weights of the model that a ``config.json`` describes, each with the name that it is
    stored under; none where Transformers does not know the model."""
    model = empty_model(config)
    if model is None:
        return {}
    keys: Mapping[str, Any] = getattr(model, "all_tied_weights_keys", None) or {}
    return {str(name): str(owner) for name, owner in keys.items()}


def empty_model(config: bytes, names: Collection[str] = ()) -> Any:
    """Return the model that a ``config.json`` describes, without memory for its weights; None where Transformers does
    not know it. A config that does not say which class it is of may be any with these ``names`` of weights, a language
    model where none fits. No code is run that lies beside a config."""
    import torch
    import transformers

    body = json.loads(config)
    given: Sequence[str] = body.get("architectures") or ()
    kinds = [getattr(transformers, str(given[0]), None)] if given else _possible(transformers, body)
    made: list[Any] = []
    for kind in kinds:
        if kind is None or not hasattr(kind, "from_pretrained"):
            continue
        try:
            known = transformers.AutoConfig.for_model(**{k: v for k, v in body.items() if k != "transformers_version"})
            with torch.device("meta"):
                model = kind(known)
        except Exception:  # a config of another version, say: then nothing is known about the model
            continue
        if given or set(names) == set(model.state_dict()):
            return model
        made.append(model)
    return made[0] if made else None


def _possible(transformers: Any, body: Mapping[str, Any]) -> list[Any]:
    """Return the classes that a config of this type may be of, those for languages first."""
    kind = type(transformers.AutoConfig.for_model(body["model_type"])) if "model_type" in body else None
    autos = (
        "CausalLM",
        "Seq2SeqLM",
        "MaskedLM",
        "SequenceClassification",
        "TokenClassification",
        "ImageClassification",
    )
    mappings = [getattr(transformers, f"AutoModelFor{auto}")._model_mapping for auto in autos]
    mappings.append(transformers.AutoModel._model_mapping)
    return [mapping[kind] for mapping in mappings if kind in mapping]
