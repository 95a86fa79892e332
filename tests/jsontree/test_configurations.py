"""OmegaConf's configurations are stored without importing it, and come back where a configuration lives."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import pytest
from support.json_trees import through_live

omegaconf: Any = pytest.importorskip("omegaconf")


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass
class Structured:
    width: int = 1
    names: list[str] = dataclasses.field(default_factory=list)
    level: Level = Level.LOW


def test_a_configuration_comes_back_as_one_with_its_interpolations() -> None:
    conf = omegaconf.OmegaConf
    saved = conf.create({"a": {"b": 1, "c": "${a.b}"}, "l": [1, "${a.c}", "???"], 3: None})
    live = conf.create({"a": {"b": 7}})
    conf.set_readonly(live, True)
    found, noted = through_live({"cfg": saved, "list": saved.l}, {"cfg": live, "list": conf.create([])})
    assert (noted.untyped, noted.mismatched) == ([], [])
    assert type(found["cfg"]) is omegaconf.DictConfig
    assert type(found["list"]) is omegaconf.ListConfig
    assert found["cfg"] == saved
    assert found["cfg"].a.c == 1
    assert conf.is_missing(found["cfg"].l, 2)
    assert conf.is_readonly(found["cfg"])
    assert conf.to_container(found["list"], resolve=False) == [1, "${a.c}", "???"]
    bare, noted = through_live(saved, None)
    assert bare == {"a": {"b": 1, "c": "${a.b}"}, "l": [1, "${a.c}", "???"], 3: None}
    assert type(bare) is dict
    assert noted.untyped == [""]


def test_a_node_of_a_configuration_keeps_its_place_in_the_live_one() -> None:
    saved = omegaconf.OmegaConf.create({"data": {"n": 5}, "model": {"n": "${data.n}", "k": 2}})
    live = omegaconf.OmegaConf.create({"data": {"n": 6}, "model": {"n": 0, "k": 0}})
    found, _ = through_live(saved.model, live.model)
    assert (found.n, found.k) == (6, 2)


def test_a_structured_configuration_keeps_its_type_or_is_a_mismatch() -> None:
    saved = omegaconf.OmegaConf.structured(Structured(3, ["a"], Level.HIGH))
    live = omegaconf.OmegaConf.structured(Structured)
    found, noted = through_live([saved], [live])
    assert noted.mismatched == []
    assert omegaconf.OmegaConf.get_type(found[0]) is Structured
    assert (found[0].width, list(found[0].names), found[0].level) == (3, ["a"], Level.HIGH)
    other = omegaconf.OmegaConf.create({"width": "wide"})
    kept, noted = through_live([other], [live])
    assert kept[0] is live
    assert "'wide'" in noted.mismatched[0]
