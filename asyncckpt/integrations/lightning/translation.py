"""Translates between the dictionary that Lightning makes of a training and the components of a checkpoint.

Lightning's dictionary has any shape. Its weights and its optimizers' states become components of their own, and all the
rest is the component ``lightning``, under Lightning's own keys. What Lightning stores by pickling a class is stored as
what it stands for: OmegaConf's configurations as plain data with a note of where they were. Weights of compiled parts
are stored by the names that they have without ``torch.compile``, and handed back by those that Lightning gave.

Of a sharded training, the live model and the live optimizers are components (``optimizer``, ``optimizer_1``, …), which
each rank saves its part of.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from asyncckpt.errors import CheckpointDamaged
from asyncckpt.state.fqn import canonical_names

#: Lightning's keys, and the components that their values become.
_COMPONENTS: Final = {"state_dict": "model", "optimizer_states": "optimizer"}
#: The component of everything else.
_REST: Final = "lightning"
#: What ``torch.compile`` puts into the names of what it wraps.
_COMPILED: Final = "_orig_mod"
#: Where Lightning's training loop keeps the states of data loaders.
_LOADERS: Final = "combined_loader"
#: What FSDP 1 puts into them.
_FLATTENED: Final = "_fsdp_wrapped_module"
_CONFIGS: Final = ("DictConfig", "ListConfig")


def to_components(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state to save. The tensors in it are those of ``checkpoint``, which are not copied, and
    ``checkpoint`` itself is left as it is."""
    configs: list[list[Any]] = []
    state: dict[str, Any] = {}
    rest: dict[Any, Any] = {}
    order: list[Any] = []
    versions: Any = None
    compiled: dict[str, str] = {}
    for key, value in checkpoint.items():
        order.append(key)
        component = _COMPONENTS.get(key)
        if component is None:
            rest[key] = _without_configs(value, [key], configs)
            continue
        if key == "state_dict":
            versions = getattr(value, "_metadata", None)
            compiled = _uncompiled(value)
            value = {compiled.get(name, name): tensor for name, tensor in value.items()}
        state[component] = value
    state[_REST] = {"checkpoint": rest, "keys": order, "configs": configs, "module_versions": versions}
    if compiled:
        state[_REST]["compiled"] = {stored: given for given, stored in compiled.items()}
    return state


def live_components(
    checkpoint: Mapping[str, Any], model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Return the state to save of a sharded training: ``model`` and ``optimizers`` themselves in the place of what
    ``checkpoint`` has of them. ``checkpoint`` is left as it is."""
    configs: list[list[Any]] = []
    rest = {key: _without_configs(value, [key], configs) for key, value in checkpoint.items() if key not in _COMPONENTS}
    parameters = canonical_names(model, [name for name, _ in model.named_parameters()])
    stored: dict[str, Any] = {"checkpoint": rest, "keys": list(checkpoint), "configs": configs}
    versions = {f"{name}.version": one._version for name, one in model.named_modules() if one._version != 1}
    stored["module_versions"] = {
        fqn.removesuffix(".version"): {"version": versions[raw]}
        for raw, fqn in canonical_names(model, versions).items()
    }
    stored["parameters"] = list(parameters.values())
    raw = [name for kind in (model.named_parameters, model.named_buffers) for name, _ in kind(remove_duplicate=False)]
    compiled = _uncompiled(name.replace(f"{_FLATTENED}.", "") for name in raw)
    if compiled:
        stored["compiled"] = {plain: given for given, plain in compiled.items()}
    return {"model": model, **numbered_optimizers(optimizers), _REST: stored}


def numbered_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers by the names that they have as components."""
    return {_optimizer_name(number): one for number, one in enumerate(optimizers)}


def trainer_part(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what Lightning has saved beside the model and the optimizers. ``stored``: the component ``lightning``.
    ``where``: see ``from_components``, which this raises as."""
    if not isinstance(stored, Mapping) or not {"checkpoint", "keys", "configs"} <= stored.keys():
        raise CheckpointDamaged(
            f"{where}: this checkpoint was not saved by Lightning's AsyncckptIO, so a Trainer cannot resume from it"
        )
    checkpoint = {key: stored["checkpoint"][key] for key in stored["keys"] if key not in _COMPONENTS}
    for path, kind in stored["configs"]:
        _make_config(checkpoint, path, kind)
    return checkpoint


def from_components(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the dictionary that ``to_components`` was given. ``where``: the checkpoint's path, for errors. Raises
    ``CheckpointDamaged`` where Lightning has not saved this checkpoint."""
    stored: Any = state.get(_REST)
    rest = trainer_part(stored, where)
    checkpoint: dict[str, Any] = {}
    for key in stored["keys"]:
        component = _COMPONENTS.get(key)
        if component is None:
            checkpoint[key] = rest[key]
        elif key == "optimizer_states" and "parameters" in stored:
            checkpoint[key] = _optimizer_states(state, stored["parameters"], where)
        else:
            checkpoint[key] = state[component]
    if "state_dict" in checkpoint:
        given = stored.get("compiled", {})
        weights: Any = OrderedDict((given.get(name, name), tensor) for name, tensor in checkpoint["state_dict"].items())
        if stored.get("module_versions") is not None:
            weights._metadata = stored["module_versions"]
        checkpoint["state_dict"] = weights
    return checkpoint


def _optimizer_name(number: int) -> str:
    return "optimizer" if number == 0 else f"optimizer_{number}"


def _optimizer_states(state: Mapping[str, Any], parameters: Sequence[str], where: str) -> list[dict[str, Any]]:
    """Return the states of the optimizers of a sharded training as Lightning has them in whole: by the numbers of the
    model's parameters."""
    numbers = {name: number for number, name in enumerate(parameters)}
    found: list[dict[str, Any]] = []
    while _optimizer_name(len(found)) in state:
        named = state[_optimizer_name(len(found))]
        if not isinstance(named, Mapping) or not {"state", "param_groups"} <= named.keys():
            raise CheckpointDamaged(
                f"{where}: {_optimizer_name(len(found))} has a state of a form of its own, which plain Lightning "
                f"cannot take in whole; resume with the strategy that saved it"
            )
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in named["param_groups"]]
        by_number = {numbers.get(name, name): values for name, values in named["state"].items()}
        found.append({**named, "state": by_number, "param_groups": groups})
    return found


def positions_in_data(checkpoint: Mapping[str, Any]) -> list[Any]:
    """Return the states of the training's data loaders that Lightning's ``checkpoint`` has; none where it has none."""
    return list(_training_loop(checkpoint).get(_LOADERS, ()))


def set_positions_in_data(checkpoint: Mapping[str, Any], states: list[Any]) -> None:
    """Put other states of data loaders into Lightning's ``checkpoint``."""
    _training_loop(checkpoint)[_LOADERS] = states


def _training_loop(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    found: Any = checkpoint
    for key in ("loops", "fit_loop", "state_dict"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, dict) else {}


def _uncompiled(names: Iterable[str]) -> dict[str, str]:
    """Return the names that ``torch.compile`` has changed, with what they were; nothing where two would be the same."""
    parts = {name: ".".join(part for part in name.split(".") if part != _COMPILED) for name in names}
    changed = {name: stored for name, stored in parts.items() if name != stored}
    return changed if len(set(parts.values())) == len(parts) else {}


def _without_configs(value: Any, path: list[Any], found: list[list[Any]]) -> Any:
    """Return ``value`` with plain data in the place of OmegaConf's configurations and of their classes; ``found`` gets
    the path and the kind of each."""
    omegaconf: Any = sys.modules.get("omegaconf")
    if omegaconf is None:
        return value
    kinds = {getattr(omegaconf, name): name for name in _CONFIGS}
    if isinstance(value, type):
        if value in kinds:
            found.append([path, f"type {kinds[value]}"])
            return None
        return value
    if type(value) in kinds:
        found.append([path, kinds[type(value)]])
        mode = omegaconf.SCMode.DICT
        return omegaconf.OmegaConf.to_container(value, resolve=False, structured_config_mode=mode)
    if type(value) is dict:
        return {key: _without_configs(item, [*path, key], found) for key, item in value.items()}
    if type(value) is list:
        return [_without_configs(item, [*path, index], found) for index, item in enumerate(value)]
    return value


def _make_config(checkpoint: dict[str, Any], path: Sequence[Any], kind: str) -> None:
    """Put the configuration, or the class, that stood at ``path`` back there."""
    import omegaconf

    owner: Any = checkpoint
    for key in path[:-1]:
        owner = owner[key]
    name = kind.removeprefix("type ")
    if name not in _CONFIGS:
        raise CheckpointDamaged(f"hyper-parameters: {kind!r} is no kind of configuration that is known here")
    owner[path[-1]] = getattr(omegaconf, name) if kind != name else omegaconf.OmegaConf.create(owner[path[-1]])
