"""A checkpoint of more ranks than anybody keeps the parts of: each part is read for what it says, and not again."""

from __future__ import annotations

import pytest
import torch
from support.many_ranks import CountingReader, in_parts, values_of

from asyncckpt.manifest import parts
from asyncckpt.manifest.parts import part_name
from asyncckpt.read.fill import fill
from asyncckpt.read.opening import open_checkpoint
from asyncckpt.read.scatter import Window
from asyncckpt.read.verify import verify
from asyncckpt.restore.restore import load_tensors
from asyncckpt.types import TensorSpec
from benchmarks.suites.ranks import simulation

RANKS = 40
SPECS = [simulation.spec_of(f"t{number}", (RANKS * (1 + number % 3), 4)) for number in range(30)]


def _made(*, own: bool = False) -> CountingReader:
    held = {spec.shape[0]: simulation.dealt(spec.shape[0], RANKS, 1) for spec in SPECS}
    return in_parts(SPECS, [held[spec.shape[0]] for spec in SPECS], RANKS, own=own)


@pytest.fixture(autouse=True)
def _few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_KEPT_BYTES", 0)


def _check(found: torch.Tensor, spec: TensorSpec) -> None:
    assert torch.equal(found, torch.from_numpy(values_of(spec))), spec.name


def test_whoever_loads_all_reads_each_part_for_its_boxes_and_for_its_extents() -> None:
    reader = _made()
    found = load_tensors(open_checkpoint(reader), None)
    for spec in SPECS:
        _check(found[f"model.{spec.name}"], spec)
    assert set(reader.parts().values()) <= {1, 2}


def test_whoever_wants_the_rows_of_two_ranks_reads_two_parts() -> None:
    reader = _made()
    with open_checkpoint(reader) as checkpoint:
        records = checkpoint.manifest.components["model"].tensors
        wanted = []
        for spec in SPECS:
            rows = spec.shape[0] // RANKS
            target = torch.zeros(2 * rows, 4)
            wanted.append((records[spec.name], [Window(target, 7 * rows * 4)]))
        fill(checkpoint, wanted)
        for spec, (_, (window,)) in zip(SPECS, wanted, strict=True):
            rows = spec.shape[0] // RANKS
            assert torch.equal(window.tensor, torch.from_numpy(values_of(spec))[7 * rows : 9 * rows])
    assert reader.parts().keys() == {part_name(7), part_name(8)}


def test_to_verify_reads_each_part_a_few_times() -> None:
    reader = _made()
    assert verify(reader) == []
    assert max(reader.parts().values()) <= 3


def test_a_tensor_that_is_named_is_found_without_other_ranks_own_components() -> None:
    reader = _made(own=True)
    found = load_tensors(open_checkpoint(reader), ["model.t0"])
    _check(found["model.t0"], SPECS[0])
    assert set(reader.parts().values()) <= {1, 2}


def test_what_ranks_have_of_their_own_without_tensors_needs_no_part_to_be_listed() -> None:
    reader = _made(own=True)
    with open_checkpoint(reader) as checkpoint:
        own = [one for name, one in checkpoint.manifest.components.items() if name.startswith("loader")]
        assert len(own) == RANKS
        assert not any(one.tensors or one.aliases or one.strides for one in own)
        assert not reader.parts()
        assert checkpoint.trees["loader+9"] == {"position": 9}
    assert reader.parts() == {part_name(9): 1}


def test_as_many_parts_are_kept_as_have_little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_KEPT_BYTES", 1 << 20)
    reader = _made()
    with open_checkpoint(reader) as checkpoint:
        for _ in range(2):  # as exports do that write one tensor after the other
            for spec in SPECS:
                target = torch.empty(spec.shape)
                fill(checkpoint, [(checkpoint.manifest.components["model"].tensors[spec.name], [Window(target)])])
                _check(target, spec)
    assert set(reader.parts().values()) == {1}
