"""Parses what a manifest says beside the state: names and assets that the user gave, and what the checkpoint was made
of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from asyncckpt.manifest.parse import Body
from asyncckpt.manifest.records import FileRecord
from asyncckpt.types import JsonValue

#: More names, or a longer one, are taken for an attack.
_MOST: Final = 1000


def parse_assets(body: Body, files: Mapping[str, FileRecord]) -> tuple[str, ...]:
    """Return the names of the files that are assets, each of which is in ``files``."""
    rows = body.optional("assets", [])
    if not isinstance(rows, list) or not all(isinstance(row, str) and row in files for row in rows):
        body.fail("has assets that are no files of it")
    if len(set(rows)) != len(rows):
        body.fail("has an asset twice")
    return tuple(rows)


def parse_names(body: Body) -> tuple[str, ...]:
    """Return the names that the save was given."""
    rows = body.optional("names", [])
    if not isinstance(rows, list) or len(rows) > _MOST:
        body.fail("has malformed names")
    for row in rows:
        if not isinstance(row, str) or not 0 < len(row) <= _MOST:
            body.fail("has a name that is no text, or a very long one")
    return tuple(rows)


def parse_derived(body: Body) -> Mapping[str, JsonValue]:
    """Return what made the checkpoint of other ones; empty where it was saved."""
    value = body.optional("derived", {})
    if not isinstance(value, dict):
        body.fail("has a 'derived' that is no object")
    if value:
        made = Body(value, body.where)
        sources = made.take("from", list)
        if not made.text("by") or not 0 < len(sources) <= _MOST:
            body.fail("has a 'derived' that names no maker, or no checkpoints")
        for source in sources:
            row = Body(source, body.where)
            row.text("attempt")
            row.text("name")
            row.whole("step")
    return value
