"""A save carries a draft of its manifest, until the digests of its files are known; whatever makes a checkpoint without
a save drafts it once they are."""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from asyncckpt import jsontree
from asyncckpt.codecs import digests
from asyncckpt.errors import InvalidOption
from asyncckpt.manifest import environment
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.component_rows import components_of, describe
from asyncckpt.manifest.pieces import KeptTexts, dumps_in_pieces
from asyncckpt.manifest.records import ComponentRecord, FileRecord, Manifest
from asyncckpt.protocols import Codec
from asyncckpt.types import ComponentSnapshot, JsonValue, Layout


@dataclass(frozen=True, slots=True)
class Contents:
    """``Contents`` is everything of a save but the bytes of its tensors. ``draft`` lacks the files and components,
    which are known only at the end. ``kinds``, ``aliases``, ``trees`` and what ``descriptions`` has are those of the
    ``ComponentSnapshot`` of each name. ``replace``: the save may take the place of a checkpoint of the same name."""

    draft: Manifest
    layout: Layout
    kinds: Mapping[str, str]
    aliases: Mapping[str, Mapping[str, str]]
    trees: Mapping[str, JsonValue]
    replace: bool
    #: The bytes of the assets, by name. In a job, rank 0 alone has any.
    assets: Mapping[str, bytes] = field(default_factory=dict)
    #: What the manifest says of each component beside its kind and its tensors, if anything (``describe``).
    descriptions: Mapping[str, Mapping[str, JsonValue]] = field(default_factory=dict)
    #: Components that other ranks have of their own, as the manifest's ``components`` lists them.
    others: Mapping[str, JsonValue] = field(default_factory=dict)
    #: The tensors of components whose files other ranks have written, too, as the manifest lists them.
    spread: Mapping[str, Mapping[str, JsonValue]] = field(default_factory=dict)


def config_tree(config: Any) -> JsonValue:
    """Return the user's ``config`` as it goes into every manifest. Raises ``InvalidOption`` for a tensor in it and
    ``UnsupportedValue`` for any other value that is not plain."""

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
    parent: str = "",
    names: Sequence[str] = (),
    assets: Mapping[str, bytes] | None = None,
    attempt: str | None = None,
    world_size: int = 1,
) -> Contents:
    """Return what a save of these components records beside their tensors. The parameters are fields of ``Manifest`` or
    of ``Contents``. Pure but for the time and, where ``attempt`` is not given, a new uuid for it."""
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
        parent=parent,
        names=tuple(names),
        assets=tuple(assets or ()),
    )
    return Contents(
        draft=draft,
        layout=layout,
        kinds={component.name: component.kind for component in components},
        aliases={component.name: component.aliases for component in components},
        trees={component.name: component.tree for component in components},
        replace=replace,
        assets=assets or {},
        descriptions={component.name: describe(component) for component in components},
    )


def finished_draft(
    written: Sequence[FileRecord],
    small: Mapping[str, bytes],
    *,
    step: int,
    name: str,
    attempt: str,
    kind: str,
    digest: str,
    layout: str,
    sequence: int,
    components: Mapping[str, ComponentRecord] | None = None,
    metrics: Mapping[str, float] | None = None,
    config: JsonValue = None,
    world_size: int = 1,
    names: Sequence[str] = (),
    assets: Collection[str] = (),
    derived: Mapping[str, JsonValue] | None = None,
    imported: Mapping[str, JsonValue] | None = None,
) -> Manifest:
    """Return the manifest of a checkpoint that no save made, of plain safetensors whose files are all written.

    ``written``: the records of the shards. ``small``: the other files, ``state.json`` among them. ``imported``: what is
    recorded of a checkpoint of another format that this one was made of. The other parameters are fields of
    ``Manifest``. Pure but for the time."""
    take = digests.get(digest)
    return Manifest(
        step=step,
        name=name,
        attempt=attempt,
        kind=kind,
        created_unix_seconds=time.time(),
        world_size=world_size,
        shard_format="safetensors",
        digest=digest,
        layout=layout,
        metrics=metrics or {},
        config=config,
        environment={**environment.record(), **({"imported": dict(imported)} if imported else {})},
        files=(*written, *(manifest.whole_file(file, body, take) for file, body in small.items())),
        components=components or {},
        sequence=sequence,
        names=tuple(names),
        assets=tuple(assets),
        derived=derived or {},
        least_version=manifest.version_of_values(small[manifest.STATE_FILE], config),
    )


def state_json(contents: Contents) -> bytes:
    """Return the text of ``state.json``. The layout keeps that of trees which are the same objects as at the save
    before. Raises ``ValueError`` for nan and infinities."""
    kept: KeptTexts = contents.layout.cache.setdefault("trees", KeptTexts())
    return kept.dumps(contents.trees)


def components_json(contents: Contents, orders: Mapping[str, Sequence[int]]) -> bytes:
    """Return the manifest's ``components`` as JSON text. The layout keeps it, because it is the same for every save;
    see ``components_of`` for ``orders``."""
    names = {
        "kinds": dict(contents.kinds),
        "aliases": {k: dict(v) for k, v in contents.aliases.items()},
        "descriptions": {k: dict(v) for k, v in contents.descriptions.items()},
    }
    key = jsontree.dumps(names), orders, contents.others, contents.spread
    cached = contents.layout.cache.get("components")
    if cached is None or cached[0] != key:
        mine = contents.kinds.keys() - contents.spread.keys()  # what a part of the manifest describes is in neither
        shards = tuple(shard for shard in contents.layout.shards if shard.component in mine)
        layout = replace(contents.layout, shards=shards)
        body = components_of(layout, contents.kinds, contents.aliases, contents.descriptions, orders)
        for name, tensors in contents.spread.items():
            body[name]["tensors"] = tensors
        body |= contents.others
        cached = contents.layout.cache["components"] = (key, dumps_in_pieces(body))
    text: bytes = cached[1]
    return text
