"""``expect_digest``: a caller who knows a checkpoint's digest from elsewhere is given that checkpoint, or nothing."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from asyncckpt import CheckpointDamaged, Checkpointer, DigestMismatch, InvalidOption, Run, SaveReport, WriterOptions
from asyncckpt.cli.app import app
from asyncckpt.manifest import json as manifests

OTHER = "sha256:" + "0" * 64


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Run, list[SaveReport]]:
    with Checkpointer(tmp_path / "run", writer=WriterOptions(digest="sha256")) as run:
        reports = [run.save(step, {"w": torch.full((9,), float(step))}).result() for step in (1, 2)]
    return Run(tmp_path / "run"), reports


def _forge(path: str) -> None:
    """Another value, every digest recomputed: good in every way but for the manifest's own hash."""
    [shard] = Path(path).glob("w-*.safetensors")
    data = shard.read_bytes()[:-4] + b"\0\0\0\1"
    shard.write_bytes(data)
    file = Path(path, "manifest.json")
    body = json.loads(file.read_bytes())
    del body["manifest_digest"]
    entry = next(entry for entry in body["files"] if entry["name"] == shard.name)
    assert len(entry["extents"]) == 1
    entry["extents"][0][2] = hashlib.sha256(data).hexdigest()
    file.write_bytes(manifests.seal(json.dumps(body).encode()[:-1]))


def test_the_digest_is_the_sha256_of_the_manifest_file(saved: Any) -> None:
    run, reports = saved
    data = Path(reports[1].path, "manifest.json").read_bytes()
    assert reports[1].manifest_digest == "sha256:" + hashlib.sha256(data).hexdigest()
    shown = json.loads(CliRunner().invoke(app, ["show", run.path, "2", "--json"]).stdout)
    assert shown["manifest_digest"] == reports[1].manifest_digest
    assert reports[1].manifest_digest in CliRunner().invoke(app, ["show", run.path, "2"]).stdout


def test_the_expected_checkpoint_is_used_like_any_other(saved: Any) -> None:
    run, reports = saved
    expected = reports[1].manifest_digest
    live = {"w": torch.zeros(9)}
    assert run.restore(live, expect_digest=expected).step == 2
    assert run.restore(live, 2, expect_digest=expected.removeprefix("sha256:").upper()).step == 2
    assert live["w"].eq(2).all()
    assert run.load_tensors(2, expect_digest=expected)["w.value"].eq(2).all()
    assert run.verify(expect_digest=expected) == []


def test_another_checkpoint_is_refused_before_anything_of_it_is_used(saved: Any) -> None:
    run, reports = saved
    _forge(reports[1].path)
    assert run.verify(2) == [], "the forgery is good by itself"
    expected = reports[1].manifest_digest
    live = {"w": torch.zeros(9)}
    with pytest.raises(DigestMismatch, match="another checkpoint, or it was changed"):
        run.restore(live, 2, expect_digest=expected)
    with pytest.raises(DigestMismatch):
        run.load_tensors(2, expect_digest=expected)
    assert "was expected" in str(run.verify(2, expect_digest=expected))
    assert not live["w"].any()


def test_there_is_no_falling_back_to_a_checkpoint_that_was_not_asked_for(saved: Any) -> None:
    run, reports = saved
    live = {"w": torch.zeros(9)}
    for digest in (OTHER, reports[0].manifest_digest):
        with pytest.raises(DigestMismatch):
            run.restore(live, expect_digest=digest)
    assert not live["w"].any()


@pytest.mark.parametrize("digest", ["", "sha256:", "xyz", "md5:" + "0" * 32, "0" * 63, "sha512:" + "0" * 64])
def test_what_is_no_sha256_is_a_usage_error(digest: str, saved: Any) -> None:
    run, _ = saved
    with pytest.raises(InvalidOption, match="64 hex digits"):
        run.verify(2, expect_digest=digest)
    assert CliRunner().invoke(app, ["verify", run.path, "--expect-digest", digest]).exit_code == 2


def test_the_command_says_one_and_zero(saved: Any) -> None:
    run, reports = saved
    call = CliRunner().invoke
    assert call(app, ["verify", run.path, "--expect-digest", reports[1].manifest_digest]).exit_code == 0
    assert call(app, ["verify", run.path, "--expect-digest", OTHER]).exit_code == 1
    assert call(app, ["verify", run.path, "--all", "--expect-digest", OTHER]).exit_code == 2


def test_digests_that_can_be_forged_are_said_to_bind_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(tmp_path / "run") as run:
        report = run.save(1, {"w": torch.zeros(9)}).result()
    with caplog.at_level(logging.WARNING, "asyncckpt"):
        assert Run(tmp_path / "run").verify(1, expect_digest=report.manifest_digest) == []
    assert "xxh3-128 digests do not bind the data" in caplog.text
    assert issubclass(DigestMismatch, CheckpointDamaged)
