"""What a save records beside its tensors, before the digests of its files are known."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncckpt import jsontree
from asyncckpt.errors import InvalidOption
from asyncckpt.manifest import environment
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.records import Manifest
from asyncckpt.protocols import Codec
from asyncckpt.types import ComponentSnapshot, JsonValue, Layout


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything of a save that is not tensor bytes. ``draft`` lacks files and components, known only at the end."""

    draft: Manifest
    layout: Layout
    kinds: Mapping[str, str]
    aliases: Mapping[str, Mapping[str, str]]
    trees: Mapping[str, JsonValue]
    replace: bool
    #: Entries of the manifest's components that other ranks' own components have.
    others: Mapping[str, JsonValue] = field(default_factory=dict)


def config_tree(config: Any) -> JsonValue:
    """The user's ``config`` as it goes into every manifest. Raises ``InvalidOption`` for a tensor in it and
    ``UnsupportedValue`` for what is no plain value."""

    def refuse(name: str, _tensor: object) -> None:
        raise InvalidOption(f"{name} is a tensor; config takes plain values only")

    return jsontree.encode(config, "config", refuse, component="config")


def contents_of(
    components: Sequence[ComponentSnapshot],
    layout: Layout,
    *,
    step: int,
    name: str,
    kind: str,
    metrics: Mapping[str, float],
    shard_format: str,
    codec: Codec,
    digest: str,
    config: JsonValue,
    replace: bool,
    sequence: int,
    attempt: str | None = None,
    world_size: int = 1,
) -> Contents:
    """What a save of these components records beside their tensors. Pure but for the time and, where ``attempt`` is not
    given, a new attempt uuid."""
    draft = Manifest(
        step=step,
        name=name,
        attempt=attempt or uuid.uuid4().hex,
        kind=kind,
        created_unix_seconds=time.time(),
        world_size=world_size,
        shard_format=shard_format,
        digest=digest,
        layout=layout.fingerprint,
        metrics=metrics,
        config=config,
        environment=environment.record(),
        files=(),
        components={},
        codec=codec.name,
        codec_options=codec.to_dict(),
        sequence=sequence,
    )
    return Contents(
        draft=draft,
        layout=layout,
        kinds={component.name: component.kind for component in components},
        aliases={component.name: component.aliases for component in components},
        trees={component.name: component.tree for component in components},
        replace=replace,
    )


def _components_json(contents: Contents, orders: Mapping[str, Sequence[int]]) -> str:
    """Kept beside the layout: it is the same for save after save."""
    names = {"kinds": dict(contents.kinds), "aliases": {k: dict(v) for k, v in contents.aliases.items()}}
    key = jsontree.dumps(names), orders, contents.others
    cached = contents.layout.cache.get("components")
    if cached is None or cached[0] != key:
        body = manifest.components_of(contents.layout, contents.kinds, contents.aliases, orders) | contents.others
        cached = contents.layout.cache["components"] = (key, jsontree.dumps(body).decode().rstrip("\n"))
    text: str = cached[1]
    return text
