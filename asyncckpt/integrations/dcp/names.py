"""Names of ``torch.distributed.checkpoint`` are translated to those of this library's manifests, and back.

DCP flattens a state dict of dicts into FQNs (``model.layers.0.weight``) and remembers the keys on the way. Here the
first key names the component, and the rest the tensor; an entry of a flat state dict belongs to ``model``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged, UnsupportedValue
from asyncckpt.manifest.parse import is_component_name
from asyncckpt.manifest.records import ComponentRecord, Manifest, StoredTensor
from asyncckpt.state.wrappers import hides_values
from asyncckpt.types import JsonValue

Path = tuple[str | int, ...]

#: Entries go to this component that are in no dict, or in one whose key cannot name a component.
FLAT = "model"
#: This component holds DCP's own side: FQNs, the keys they were made of, and plain values.
OWN = "dcp"


def place_of(fqn: str, path: Path | None) -> tuple[str, str]:
    """Return the component and the name of an entry. Pure: every rank finds the same."""
    if path and len(path) > 1:
        first = str(path[0])
        if fqn.startswith(f"{first}.") and _is_free(first):
            return first, fqn.removeprefix(f"{first}.")
    return FLAT, fqn


def _is_free(name: str) -> bool:
    return is_component_name(name) and name not in ("state", OWN)


@dataclass(frozen=True, slots=True)
class Names:
    """``Names`` is what a checkpoint that DCP wrote says about its entries.

    ``tensors`` maps FQNs to component and name, ``paths`` FQNs to the keys they were made of, ``trees`` FQNs to encoded
    values, which ``value`` decodes.
    """

    tensors: Mapping[str, tuple[str, str]]
    paths: Mapping[str, Path]
    trees: Mapping[str, JsonValue]

    def value(self, fqn: str, live: Any) -> Any:
        """Return a stored value; numbers and text are of the live one's class where that is a subclass. Raises
        ``CheckpointDamaged``."""
        return jsontree.decode(self.trees[fqn], _no_tensor, live=jsontree.Live(live))


def check_has_bytes(fqn: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor of a subclass that wraps others or computes its values: DCP plans for none of what is inside, and
    a copy of the outside would be something else. Raises ``UnsupportedValue``."""
    if hides_values(tensor):
        raise UnsupportedValue(
            f"{fqn}: a {type(tensor).__name__} has no bytes of its own, and torch.distributed.checkpoint does not ask "
            f"for those inside it. Give it the tensors inside (__tensor_flatten__ names them), or use "
            f"asyncckpt.Checkpointer, which stores them"
        )


def components_of(
    records: Mapping[str, StoredTensor], paths: Mapping[str, Path], values: Mapping[str, Any]
) -> tuple[dict[str, ComponentRecord], dict[str, JsonValue]]:
    """Return the manifest's components and the trees of ``state.json`` for these entries; ``values`` may be ``Encoded``
    ones. A component whose tensors all
    have one key each is a module; others are plain, and restore as the dicts and lists they were. Raises
    ``UnsupportedValue``."""
    tensors: dict[str, dict[str, StoredTensor]] = {}
    trees: dict[str, Any] = {}
    deep: set[str] = set()
    for fqn in (*records, *values):
        if fqn not in records and len(paths.get(fqn, (fqn,))) == 1 and _is_free(fqn):
            trees[fqn], tensors[fqn] = values[fqn], {}  # a value that stands beside the dicts becomes a component
            continue
        component, name = place_of(fqn, paths.get(fqn))
        keys = paths.get(fqn, (fqn,))
        inner = keys[1:] if (component, name) != (FLAT, fqn) else (fqn,)
        tensors.setdefault(component, {})
        if fqn in records:
            tensors[component][name] = records[fqn]
        if len(inner) > 1:
            deep.add(component)
        _put(trees.setdefault(component, {}), inner, _Reference(name) if fqn in records else values[fqn])
    components: dict[str, ComponentRecord] = {}
    encoded: dict[str, JsonValue] = {}
    for component, found in tensors.items():
        kind = "plain" if component in deep or not found else "module"
        tree = trees[component]
        if kind == "module":
            tree = {key: value for key, value in tree.items() if not isinstance(value, _Reference)}
        components[component] = ComponentRecord(kind, found, {})
        encoded[component] = _encode(tree, component)
    own = {
        "tensors": {fqn: list(place_of(fqn, paths.get(fqn))) for fqn in records},
        "paths": {fqn: list(path) for fqn, path in paths.items()},
        "values": dict(values),
    }
    components[OWN] = ComponentRecord("plain", {}, {})
    encoded[OWN] = encode_value(own, OWN)
    return components, encoded


def encode_value(value: Any, where: str) -> JsonValue:
    """Encode a plain value as JSON. Raises ``UnsupportedValue`` for what could only be pickled, for a tensor inside,
    and for values whose type only a live one can say: DCP takes those out of the state before it asks to load."""

    def refuse(name: str, _tensor: object) -> None:
        raise UnsupportedValue(
            f"{where}: there is a tensor at {name!r} inside a value that the planner does not flatten; put it into a "
            f"dict or list of the state dict"
        )

    tree = jsontree.encode(value, "", refuse, component=where)
    if jsontree.needs_live(tree, scalars=False):
        raise UnsupportedValue(
            f"{where}: DCP's load hands no live value over that could say the type of an enum, a named tuple, a "
            f"dataclass or a configuration ({type(value).__name__}); store its plain values, such as "
            f"dataclasses.asdict gives, or save with asyncckpt's Checkpointer"
        )
    return tree


def names_of(manifest: Manifest, trees: Mapping[str, JsonValue]) -> Names:
    """Read back what ``components_of`` wrote. Where DCP did not write the checkpoint, its tensors have qualified names.
    Raises ``CheckpointDamaged``."""

    if OWN not in manifest.components or OWN not in trees:
        qualified = {
            f"{component}.{name}": (component, name)
            for component, record in manifest.components.items()
            for name in (*record.tensors, *record.aliases)
        }
        return Names(qualified, {}, {})
    tree = trees[OWN]
    own = jsontree.decode(tree, _no_tensor)
    if not isinstance(own, dict) or not all(isinstance(own.get(key), dict) for key in ("tensors", "paths", "values")):
        raise CheckpointDamaged(f"component {OWN!r} does not look like what DCP's writer leaves")
    tensors: dict[str, tuple[str, str]] = {}
    for fqn, place in own["tensors"].items():
        if not isinstance(place, list) or len(place) != 2 or place[0] not in manifest.components:
            raise CheckpointDamaged(f"component {OWN!r} places {fqn!r:.80} nowhere")
        if place[1] not in manifest.components[place[0]].tensors:
            raise CheckpointDamaged(f"component {OWN!r} lists {fqn!r:.80}, which the manifest does not")
        tensors[fqn] = place[0], place[1]
    paths: dict[str, Path] = {}
    for fqn, path in own["paths"].items():
        if not isinstance(path, list) or not all(isinstance(key, str | int) for key in path):
            raise CheckpointDamaged(f"component {OWN!r} has a malformed path of {fqn!r:.80}")
        paths[fqn] = tuple(path)
    return Names(tensors, paths, _items(tree["values"]) if isinstance(tree, dict) else {})


def _no_tensor(name: str) -> torch.Tensor:
    raise CheckpointDamaged(f"{OWN}: refers to a tensor {name!r:.80}")


def _items(tree: Any) -> dict[str, JsonValue]:
    """Return the items of an encoded dict that has been decoded before, and so is none of a forger's."""
    if "$" not in tree:
        return dict(tree)
    flat = tree["v"]
    return {jsontree.decode(key, _no_tensor): item for key, item in zip(flat[::2], flat[1::2], strict=True)}


class _Reference:
    """A reference stands for a stored tensor; its placeholder can be encoded in the tensor's place."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensor = torch.empty(0, device="meta")


def _put(tree: Any, path: Sequence[str | int], value: Any) -> None:
    """Put the value at the end of the path. All containers are dicts until ``_encode`` makes lists of some."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UnsupportedValue(f"{path}: two entries of the state dict have one name")
    tree[path[-1]] = value


def _encode(tree: Any, component: str) -> JsonValue:
    names: dict[int, str] = {}
    kept: list[torch.Tensor] = []  # the ids are keys for as long as these tensors live
    found: dict[str, str] = {}

    def built(node: Any) -> Any:
        if isinstance(node, _Reference):
            names[id(node.tensor)] = node.name
            kept.append(node.tensor)
            return node.tensor
        if type(node) is not dict:
            return node
        values = {key: built(value) for key, value in node.items()}
        # DCP itself takes a dict of the keys 0, 1, ... for a list
        return list(values.values()) if values and list(values) == list(range(len(values))) else values

    def sink(called: str, tensor: torch.Tensor) -> None:
        if id(tensor) not in names:
            raise UnsupportedValue(
                f"{component}: {called!r} is a tensor inside a value that the planner does not flatten"
            )
        found[called] = names[id(tensor)]

    def named(node: JsonValue) -> JsonValue:
        if isinstance(node, list):
            return [named(item) for item in node]
        if not isinstance(node, dict):
            return node
        called = node.get("v")
        if node.get("$") == "tensor" and isinstance(called, str):
            return {"$": "tensor", "v": found[called]}
        return {key: named(value) for key, value in node.items()}

    return named(jsontree.encode(built(tree), "", sink, component=component))
