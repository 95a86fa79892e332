"""Delta saves: differences to the checkpoint before, every checkpoint complete by itself all the same."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from conftest import bits
from support.options import by_stage

from asyncckpt import Checkpointer, Delta, InvalidOption, KeepLast, ManifestInvalid, Run, Safetensors, WriterOptions
from asyncckpt.manifest import json as manifests
from asyncckpt.testing import Fault, FaultyOps, Site, SiteFaultOps, SlowOps


def _weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(300, 400).to(torch.bfloat16),
        "b": torch.randn(50_000),
        "small": torch.randn(10),
        "still": torch.randn(40_000),
    }


def _step(weights: dict[str, torch.Tensor]) -> None:
    """A small update: most exponents stay."""
    for name in ("a", "b"):
        weights[name] *= 1 + 1e-2 * torch.rand_like(weights[name])


def _same(run: Run, step: int, weights: dict[str, torch.Tensor]) -> None:
    assert run.verify(step) == []
    loaded = run.load_tensors(step)
    for name, tensor in weights.items():
        assert bits(loaded[f"w.{name}"]) == bits(tensor), (step, name)


@pytest.mark.parametrize("chain", [1, 3])
@pytest.mark.parametrize("extent_bytes", [8192, 8 << 20])
def test_every_checkpoint_of_a_chain_comes_back_and_is_complete_by_itself(
    chain: int, extent_bytes: int, tmp_path: Path
) -> None:
    weights = _weights()
    saved: dict[int, dict[str, torch.Tensor]] = {}
    with Checkpointer(
        tmp_path / "run", files=Safetensors(codec="planes", delta=Delta(chain=chain), extent_bytes=extent_bytes)
    ) as run:
        for step in range(1, 7):
            run.save(step, {"w": weights}).result()
            saved[step] = {name: tensor.clone() for name, tensor in weights.items()}
            _step(weights)
        for step, expected in saved.items():
            _same(run, step, expected)
    folders = [len(list((tmp_path / f"run/step-0000000{step}/base").glob("*"))) for step in range(1, 7)]
    assert folders == [number % (chain + 1) for number in range(6)], "the chain is bounded, and everything saved anew"
    # each one alone, in another place, without the others
    for step, expected in saved.items():
        alone = tmp_path / f"alone-{step}"
        shutil.copytree(tmp_path / f"run/step-0000000{step}", alone / f"step-0000000{step}")
        _same(Run(alone), step, expected)


def test_a_delta_is_smaller_than_what_it_stands_for(tmp_path: Path) -> None:
    weights = {"a": torch.randn(1000, 1000).to(torch.bfloat16)}
    with Checkpointer(tmp_path / "run", files=Safetensors(codec="planes", delta=Delta())) as run:
        first = run.save(1, {"w": weights}).result()
        weights["a"] = (weights["a"].float() * (1 + 1e-2 * torch.rand(1000, 1000))).to(torch.bfloat16)
        second = run.save(2, {"w": weights}).result()
    assert second.written_bytes < 0.7 * first.written_bytes
    assert second.nbytes > first.nbytes, "what it builds on is part of it"


def test_retention_takes_nothing_from_those_that_build_on_what_it_deletes(tmp_path: Path) -> None:
    weights = _weights()
    with Checkpointer(
        tmp_path / "run", keep=KeepLast(1), files=Safetensors(codec="planes", delta=Delta(chain=8))
    ) as run:
        for step in range(1, 6):
            run.save(step, {"w": weights}).result()
            run.wait()
            assert [entry.step for entry in run.ls()] == [step]
            _same(run, step, weights)
            _step(weights)


def test_a_chain_goes_on_after_a_restart(tmp_path: Path) -> None:
    weights = _weights()
    for step in range(1, 5):
        with Checkpointer(tmp_path / "run", files=Safetensors(codec="planes", delta=Delta(chain=2))) as run:
            run.save(step, {"w": weights}).result()
            _same(run, step, weights)
        _step(weights)
    assert (tmp_path / "run/step-00000003/base").is_dir()
    assert not (tmp_path / "run/step-00000004/base").exists()


def test_a_shard_of_which_only_a_part_changed(tmp_path: Path) -> None:
    """Extents that matched are taken over through the layers they are stored in."""
    weights = {"a": torch.randn(100, 1000), "z": torch.randn(100, 1000)}
    with Checkpointer(
        tmp_path / "run", files=Safetensors(codec="planes", delta=Delta(chain=3), extent_bytes=4096)
    ) as run:
        for step in range(1, 6):
            run.save(step, {"w": weights}).result()
            _same(run, step, weights)
            weights["z"][-1] += 1e-3


@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_that_changed_in_part_is_saved_though_the_disk_is_behind(threads: int, tmp_path: Path) -> None:
    """What is copied from a base is encoded again, and buffers for that come back from those that write: once all of
    them copied, the save stood still until its deadline."""
    weights = {"part": torch.randn(400_000), "all": torch.randn(800_000)}
    writer = WriterOptions(threads=threads, durable_timeout_seconds=20)
    with Checkpointer(
        tmp_path / "run", files=Safetensors(codec="planes", delta=Delta(), extent_bytes=32768), writer=writer
    ) as run:
        run._store.ops = SlowOps(0.002)
        for step in range(1, 4):
            run.save(step, weights).result()
            assert run.verify(step) == []
            weights["part"][-1] += 1
            weights["all"] += 1


@pytest.mark.parametrize("damage", ["missing", "flipped", "swapped"])
def test_a_damaged_base_is_found_and_named(damage: str, tmp_path: Path) -> None:
    weights = _weights()
    with Checkpointer(tmp_path / "run", files=Safetensors(codec="planes", delta=Delta())) as run:
        for step in (1, 2, 3):
            run.save(step, {"w": weights}).result()
            _step(weights)
    path = tmp_path / "run/step-00000003"
    base, other = sorted(path.glob("base/*/*"))
    if damage == "missing":
        base.unlink()
    elif damage == "flipped":
        data = bytearray(base.read_bytes())
        data[-5000] ^= 1
        base.unlink()
        base.write_bytes(data)
    else:
        one, two = base.read_bytes(), other.read_bytes()
        size = max(len(one), len(two))
        for file, content in ((base, two), (other, one)):
            file.unlink()
            file.write_bytes(content.ljust(size, b"\0"))
    reader = Run(tmp_path / "run")
    found = reader.verify(3)
    assert found
    assert "base/step-0000000" in found[0].file
    with pytest.raises(ValueError, match="base/step-0000000"):
        reader.load_tensors(3, ["w.a"])
    assert reader.verify(1) == [], "hard links were cut, so the others still have theirs"


def test_a_manifest_with_a_base_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    weights = _weights()
    with Checkpointer(tmp_path / "run", files=Safetensors(codec="planes", delta=Delta())) as run:
        for step in (1, 2):
            run.save(step, {"w": weights}).result()
            _step(weights)
    file = tmp_path / "run/step-00000002/manifest.json"
    data = file.read_bytes()
    body = data[: data.rfind(b',"manifest_digest"')]
    for old, new in (
        (b'"bases":["base/', b'"bases":["nowhere/'),
        (b'"bases":["base/', b'"bases":["state.json","base/'),
        (b'"bases":[', b'"bases":[7,'),
    ):
        assert old in body
        with pytest.raises(ManifestInvalid, match="base"):
            manifests.decode(manifests.seal(body.replace(old, new)), "here")


def test_without_links_everything_is_saved(tmp_path: Path) -> None:
    class NoLinks(FaultyOps):
        def link(self, source: str, target: str) -> None:
            raise OSError(1, "no links here")

        def reflink(self, source: str, target: str) -> None:
            raise OSError(95, "no reflinks here")

    weights = _weights()
    with Checkpointer(tmp_path / "run", files=Safetensors(codec="planes", delta=Delta())) as run:
        run.prepare({"w": weights})
        run._store.ops = NoLinks()
        for step in (1, 2):
            run.save(step, {"w": weights}).result()
            _same(run, step, weights)
            _step(weights)
    assert not list((tmp_path / "run/step-00000002").glob("base/*/*"))


@pytest.mark.parametrize("options", [{"codec": "none"}, {"codec": "planes", "incremental": False}])
def test_where_delta_makes_no_sense_it_is_refused(options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="delta"):
        Checkpointer(tmp_path / "run", **by_stage(delta=Delta(), **options))  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="chain"):
        Delta(chain=0)


def _after_a_link_failed(path: Path, subject: str, occurrence: int, *, changed: bool) -> None:
    """The third save of a chain, in which the file system has no further link for one file."""
    weights = _weights()
    with Checkpointer(path, files=Safetensors(codec="planes", delta=Delta(chain=3), extent_bytes=8192)) as run:
        for step in (1, 2):
            _step(weights)
            run.save(step, {"w": weights}).result()
        ops = SiteFaultOps(str(path))
        run._store.ops, run._store.reflinks = ops, False
        ops.arm(Fault(Site("link", subject, occurrence), "before", errno.EMLINK))
        if changed:
            _step(weights)
        run.save(3, {"w": weights}).result()
        assert ops.hits, "the link was never tried"
        _same(run, 3, weights)


def test_a_base_that_can_be_linked_no_more_leaves_a_checkpoint_that_verifies(tmp_path: Path) -> None:
    """What was linked before it is listed and of no use: ``verify`` called that damage."""
    _after_a_link_failed(tmp_path / "run", ".tmp-*/base/step-*/w-00002-of-00002.safetensors", 2, changed=True)


def test_an_unchanged_file_that_can_be_linked_no_more_leaves_a_checkpoint_that_verifies(tmp_path: Path) -> None:
    """Its base had been linked before it and was not listed: a checkpoint was published and then refused."""
    _after_a_link_failed(tmp_path / "run", ".tmp-*/w-00002-of-00002.safetensors", 1, changed=False)
