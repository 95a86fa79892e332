"""Model directories of Transformers and adapter directories of PEFT out, with the files that the checkpoint has as
assets."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from asyncckpt.convert.exporting import Export
from asyncckpt.convert.huggingface import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, empty_model
from asyncckpt.convert.safetensors_out import _ordered, write_folder, write_shards
from asyncckpt.convert.stored import components
from asyncckpt.errors import InvalidOption, MissingExtra
from asyncckpt.read.opening import OpenCheckpoint


def choose_model(checkpoint: OpenCheckpoint, what: str) -> str:
    """Return the component that a model directory is made of: ``model``, where several modules are meant."""
    modules = components(checkpoint.manifest, what, checkpoint.path)
    return "model" if what == "weights" and len(modules) > 1 and "model" in modules else what


def choose_adapter(checkpoint: OpenCheckpoint, what: str) -> str:
    """Return the component of the adapter, where several modules are meant."""
    if what != "weights":
        return what
    found = [
        name
        for name in components(checkpoint.manifest, what, checkpoint.path)
        if isinstance(tree := checkpoint.trees.get(name), dict) and "adapter" in tree
    ]
    if len(found) > 1:
        raise InvalidOption(f"{checkpoint.path}: adapters are {', '.join(found)}; choose one with --component")
    return found[0] if found else what


def write_model_directory(job: Export) -> None:
    """Write a directory that ``from_pretrained`` opens: shards, their index, ``config.json`` and the other assets.

    The weights' names are compared with those of the model that the config describes, because Transformers would only
    warn of a missing one and go on with random numbers. Raises ``InvalidOption`` where they differ, and where the
    checkpoint has no ``config.json``; ``MissingExtra`` without Transformers."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtra("--hf needs transformers: pip install 'asyncckpt[transformers]'") from error
    assets = job.checkpoint.assets()
    if CONFIG not in assets:
        raise InvalidOption(
            f"{job.checkpoint.path} has no {CONFIG} among its assets, which a model directory needs: save with "
            f"assets=[model.config, tokenizer], or export to .safetensors and add the files yourself"
        )
    config = _config(assets[CONFIG], job, _checked_class(job, assets[CONFIG]))
    write_folder(job)
    for name, data in assets.items():
        if name != ADAPTER_CONFIG:
            job.output.write(name, config if name == CONFIG else data)


def write_adapter_directory(job: Export) -> None:
    """Write a directory that ``PeftModel.from_pretrained(base, directory)`` opens. Raises ``InvalidOption`` where the
    checkpoint has no ``adapter_config.json``."""
    assets = job.checkpoint.assets()
    folder = ""
    tree: Any = job.checkpoint.trees.get(job.components[0])
    identity = tree.get("adapter") if isinstance(tree, dict) else None
    if not isinstance(identity, dict):
        raise InvalidOption(
            f"{job.checkpoint.path}: {job.what!r} is no adapter, which a directory of PEFT needs with its "
            f"{ADAPTER_CONFIG}: save adapters with integrations.peft.Adapters"
        )
    if identity.get("name") not in (None, "default"):
        folder = f"{identity['name']}/"
    if folder + ADAPTER_CONFIG not in assets:
        raise InvalidOption(
            f"{job.checkpoint.path} has no {folder}{ADAPTER_CONFIG} among its assets: save adapters with "
            f"integrations.peft.Adapters, which keeps it"
        )
    write_shards(job, job.items, [_ordered(job.items)], lambda _number, _count: ADAPTER_WEIGHTS)
    job.output.write(ADAPTER_CONFIG, assets[folder + ADAPTER_CONFIG])


def _config(config: bytes, job: Export, kind: str) -> bytes:
    """Return the config with the dtype that the weights get, as which Transformers loads them, and with the class of
    the model, which a config has only where the model itself was saved."""
    body = json.loads(config)
    if job.dtype is None and (body.get("architectures") or not kind):
        return config
    if kind and not body.get("architectures"):
        body["architectures"] = [kind]
    if job.dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in body] or ["dtype"]
        body |= dict.fromkeys(keys, str(job.dtype).removeprefix("torch."))
    return (json.dumps(body, indent=2) + "\n").encode()


def _checked_class(job: Export, config: bytes) -> str:
    """Compare names and shapes with those of the model; return its class's name, empty where it is not known. Raises
    ``InvalidOption``."""
    model = empty_model(config, [item.name for item in job.items])
    if model is None:
        job.notes.append("Transformers does not know the model of the config, so names were not compared")
        return ""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {str(name) for name in getattr(model, "all_tied_weights_keys", None) or {}}
    there = {item.name: item.shape for item in job.items}
    missing = [name for name in wanted if name not in there and name not in tied]
    extra = [name for name in there if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    odd = [
        f"{name} {list(there[name])}, not {list(wanted[name])}"
        for name in wanted
        if there.get(name, wanted[name]) != wanted[name]
    ]
    kind = type(model).__name__
    if not (missing or extra or odd):
        return kind
    if not odd and all(_is_converted(name) for name in (*missing, *extra)):
        job.notes.append("experts have the names of files, not those of the model; Transformers converts them")
        return kind
    raise InvalidOption(
        f"{job.checkpoint.path}: these are not the weights of the {kind} in {CONFIG}"
        f"{_listed('missing', missing)}{_listed('unknown', extra)}{_listed('of another shape', odd)}"
        f"{_hint(missing, extra)}"
    )


def _is_converted(name: str) -> bool:
    """Whether Transformers may have this name for weights that it fuses while it loads them."""
    return ".experts." in name


def _listed(what: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"; {what}: {shown}" if names else ""


def _hint(missing: Sequence[str], extra: Iterable[str]) -> str:
    """Say which ``--rename`` would do, where names differ in how they begin."""
    for name in extra:
        for wanted in missing:
            if name.endswith(f".{wanted}"):
                return f"; try --rename {name.removesuffix(f'.{wanted}')}="
            if wanted.endswith(f".{name}"):
                return f"; try --rename ={wanted.removesuffix(f'.{name}')}"
        alike = difflib.get_close_matches(name, missing, n=1)
        if alike:
            return f"; is {name} meant to be {alike[0]}? --rename {name}={alike[0]}"
    return ""
