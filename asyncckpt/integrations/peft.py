"""Adapters of a PEFT model are a component of their own: they are stored without their base, where PEFT looks for
them."""

from __future__ import annotations

import copy
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from asyncckpt.errors import InvalidOption, MissingExtra
from asyncckpt.manifest.parse import is_file_name
from asyncckpt.state.fqn import unwrapped

_WEIGHTS_FILE = "adapter_model.safetensors"
_CONFIG_FILE = "adapter_config.json"
#: PEFT keeps the adapter of this name in the directory itself, and every other one in a folder of its name.
_DEFAULT = "default"
#: What is stored beside the tensors: it says which adapter they are.
_IDENTITY = "adapter"


class Adapters(nn.Module):
    """A component of the state that has one adapter of a PEFT model, and nothing of its base.

    ``model``: a ``PeftModel``, in wrappers or not. ``adapter``: the name of one of its adapters; it can be left out
    where the model has only one. ``Adapters.all`` makes one component for each.

    A checkpoint then holds ``adapter_model.safetensors`` with the names that PEFT gives, and ``adapter_config.json``
    as an asset, which names the base: ``PeftModel.from_pretrained(base, checkpoint)`` opens the directory as it lies.
    An adapter that is not called ``default`` lies in a folder of its name, where PEFT puts it, too. What PEFT saves
    with an adapter is stored: ``modules_to_save``, trained biases, resized embeddings (``save_embedding_layers``: see
    ``PeftModel.save_pretrained``; ``"auto"`` may ask the Hub, once, when this is made). An optimizer of the adapter's
    parameters finds their names here. A restore fills a live model in place; the adapter must have the name that it
    was saved with. With zarr, or files by rank, the tensors are stored, but not in PEFT's file.

    Keeps a reference to the model. For the training thread. Raises ``InvalidOption`` for what is no PEFT model, for a
    name of an adapter that there is not, or that is no folder's, and for a kind of adapter whose stored tensors are
    computed (prompts); ``MissingExtra`` where PEFT is not installed.
    """

    def __init__(
        self, model: nn.Module, adapter: str | None = None, *, save_embedding_layers: bool | Literal["auto"] = "auto"
    ) -> None:
        super().__init__()
        bare = _peft_model(model)
        self.adapter = _chosen(bare, adapter)
        folder = "" if self.adapter == _DEFAULT else f"{self.adapter}/"
        #: The file that the tensors lie in; see ``protocols.LiesInFile``.
        self.checkpoint_file = f"{folder}{_WEIGHTS_FILE}"
        self._config_file = f"{folder}{_CONFIG_FILE}"
        if not is_file_name(self.checkpoint_file):
            raise InvalidOption(
                f"adapter {self.adapter!r}: PEFT keeps it in a folder of its name, which a checkpoint cannot have; "
                f"name it with letters, digits and ._=+-"
            )
        self.__dict__["_model"] = bare  # as a child, all of the base would belong to this module
        self._raw_names = _raw_names(bare, self.adapter, save_embedding_layers)

    @classmethod
    def all(cls, model: nn.Module, prefix: str = "adapter") -> dict[str, Adapters]:
        """Return one component for each adapter of the model, to be put into the state: ``{"adapter": …}`` for the one
        called ``default``, ``{"adapter_<name>": …}`` for others. Raises as the class does."""
        names = list(_peft_model(model).peft_config)
        return {prefix if name == _DEFAULT else f"{prefix}_{name}": cls(model, name) for name in names}

    def checkpoint_assets(self) -> Mapping[str, bytes]:
        """Return ``adapter_config.json`` as PEFT's ``save_pretrained`` writes it."""
        model = self.__dict__["_model"]
        self._tensors()  # raises where the adapter is gone
        config = copy.deepcopy(model.peft_config[self.adapter])
        base = model.base_model if config.is_prompt_learning else model.base_model.model
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = vars(base).get("name_or_path") or None
        config.inference_mode = True
        mapping = None
        if config.task_type is None:
            kind = type(model.get_base_model())
            mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        with tempfile.TemporaryDirectory(prefix="asyncckpt-peft-") as folder:
            config.save_pretrained(folder, auto_mapping_dict=mapping)
            return {self._config_file: Path(folder, _CONFIG_FILE).read_bytes()}

    def checkpoint_mismatch(self, stored: Mapping[str, Any]) -> str | None:
        """Say why this adapter cannot take what was stored; None where it can."""
        saved, mine = stored.get(_IDENTITY), self._identity()
        if not isinstance(saved, dict):
            return "no adapter was saved under this name"
        differing = [key for key in mine if saved.get(key) != mine[key]]
        if not differing:
            return None
        what = ", ".join(f"{key} {str(saved.get(key))!r:.100}, live {mine[key]!r}" for key in differing)
        return (
            f"saved as the adapter of {what}. Add an adapter of that name to the live model, or read the tensors with "
            f"Run.load and give them to peft.set_peft_model_state_dict"
        )

    def _identity(self) -> dict[str, str]:
        config = self.__dict__["_model"].peft_config[self.adapter]
        return {"name": self.adapter, "kind": str(getattr(config.peft_type, "value", config.peft_type))}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the live tensors by the names that PEFT stores them under."""
        model = self.__dict__["_model"]
        there: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        there |= dict(model.named_buffers(remove_duplicate=False))
        lost = [raw for raw in self._raw_names.values() if raw not in there]
        if lost:
            raise InvalidOption(
                f"the model has no {lost[0]!r} any more: make Adapters anew after changing its adapters"
            )
        return {name: there[raw] for name, raw in self._raw_names.items()}

    def state_dict(self, *_: Any, prefix: str = "", keep_vars: bool = False, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the adapter's tensors by PEFT's names, and which adapter it is."""
        tensors = self._tensors()
        found = OrderedDict((f"{prefix}{k}", v if keep_vars else v.detach()) for k, v in tensors.items())
        return OrderedDict[str, Any]({**found, f"{prefix}{_IDENTITY}": self._identity()})

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        """Copy tensors into the live model, by the names that ``state_dict`` gives."""
        tensors = self._tensors()
        with torch.no_grad():
            for name, value in state_dict.items():
                if name in tensors and value is not tensors[name]:
                    tensors[name].copy_(value)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the adapter's parameters by the names that PEFT stores them under."""
        seen: set[int] = set()
        for name, tensor in self._tensors().items():
            if isinstance(tensor, nn.Parameter) and not (remove_duplicate and id(tensor) in seen):
                seen.add(id(tensor))
                yield f"{prefix}.{name}" if prefix else name, tensor

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the buffers that are stored with the adapter."""
        for name, tensor in self._tensors().items():
            if not isinstance(tensor, nn.Parameter):
                yield f"{prefix}.{name}" if prefix else name, tensor


def _peft_model(model: nn.Module) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("Adapters needs peft: pip install peft") from error
    bare = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(bare, peft.PeftModel | peft.PeftMixedModel):
        raise InvalidOption(f"Adapters takes a PeftModel, not a {type(bare).__name__}")
    return bare


def _chosen(model: Any, adapter: str | None) -> str:
    there = list(model.peft_config)
    if adapter is None and len(there) == 1:
        return str(there[0])
    if adapter is None:
        raise InvalidOption(
            f"the model has the adapters {', '.join(there)}: give Adapters the name of one, or put all of them into "
            f"the state with **Adapters.all(model)"
        )
    if adapter not in there:
        raise InvalidOption(f"the model has no adapter {adapter!r}; it has {', '.join(there)}")
    return adapter


def _raw_names(model: Any, adapter: str, save_embedding_layers: bool | Literal["auto"]) -> dict[str, str]:
    """Map each name that PEFT stores a tensor of the adapter under to its key in the model's ``state_dict``."""
    from peft import get_peft_model_state_dict

    raw = model.state_dict(keep_vars=True)
    names = {id(value): name for name, value in reversed(raw.items())}
    chosen = get_peft_model_state_dict(
        model, state_dict=raw, adapter_name=adapter, save_embedding_layers=save_embedding_layers
    )
    computed = [name for name, value in chosen.items() if id(value) not in names]
    if computed:
        kind = model.peft_config[adapter].peft_type
        raise InvalidOption(
            f"adapter {adapter!r}: PEFT computes {computed[0]!r} for {kind} when it saves, so it cannot be restored in "
            f"place. Put the PeftModel itself into the state"
        )
    return {name: names[id(value)] for name, value in chosen.items()}
