"""DeepSpeed's checkpoints are saved and loaded through asyncckpt as they are by DeepSpeed itself."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from frameworks.deepspeed_trainings import Asked, digest, train
from support import harness
from support.harness import Crews, Me

import asyncckpt
from asyncckpt import Run
from asyncckpt.convert.formats import import_checkpoint

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        find_spec("deepspeed") is None, reason="DeepSpeed has an environment of its own: make test-deepspeed"
    ),
]

MODES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
#: Building DeepSpeed's operator, which it does at the first training, takes a minute or two.
LONG = 600.0


@pytest.fixture(scope="module")
def crews(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crews]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    # a process that is killed while it loads DeepSpeed's operator leaves a lock, for which all others wait for ever
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("operators"))
    harness.CONTEXT.set_forkserver_preload(["torch._dynamo", "deepspeed", "asyncckpt.checkpointer"])
    kept = Crews()
    yield kept
    kept.close()


def ends(crews: Crews, ranks: int = 2, **asked: Any) -> list[Any]:
    return crews(ranks).values(train, Asked(**asked), timeout=LONG)


@pytest.mark.parametrize(("stage", "dtype"), MODES)
def test_resumed_training_ends_as_the_unbroken_one_with_plain_deepspeed(
    stage: int, dtype: str, crews: Crews, tmp_path: Path
) -> None:
    mode: dict[str, Any] = {"folder": str(tmp_path), "stage": stage, "dtype": dtype}
    plain = ends(crews, ours=False, resume=False, every=0, **mode)
    ends(crews, last=5, **mode)
    assert (tmp_path / "saved" / "latest").read_text() == "global_step4"
    again = ends(crews, seed=7, **mode)
    assert [one.end for one in again] == [one.end for one in plain]
    assert all(one.first == 4 and one.state == {"a": (1, None), 2: [True, 0.5]} for one in again)
    assert (tmp_path / "saved" / "latest").read_text() == "global_step6"
    assert not list((tmp_path / "saved").rglob("*.tmp*"))


def test_killed_in_the_middle_of_saves_it_resumes_and_ends_as_the_unbroken_one(crews: Crews, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = ends(crews, folder=str(tmp_path / "whole"))
    chosen = int(os.environ.get("ASYNCCKPT_SEED", "0")) or random.Random(os.urandom(8)).randrange(1 << 30)
    drawn = random.Random(chosen)
    for number in range(4):
        rank = 0 if number % 4 else 1
        point = drawn.randrange(2, whole[rank].calls)
        folder = tmp_path / f"killed-{rank}-{point}"
        folder.mkdir()
        crew = crews(2)
        crew.start(train, Asked(folder=str(folder), kill=(rank, point)))
        outcomes = crew.collect(60.0, without=[1 - rank])  # who waits for its peer
        assert outcomes[rank].gone, (outcomes, chosen)
        again = ends(crews, folder=str(folder))
        assert [one.end for one in again] == [one.end for one in whole], (rank, point, chosen)
        assert (folder / "saved" / "latest").read_text() == "global_step6"


def test_plain_deepspeeds_checkpoint_goes_on_with_ours_and_ours_with_plain_deepspeed(
    crews: Crews, tmp_path: Path
) -> None:
    from asyncckpt.integrations.deepspeed import export

    plain = ends(crews, folder=str(tmp_path / "plain"), ours=False)
    for first_ours in (False, True):
        folder = tmp_path / f"first-ours-{first_ours}"
        ends(crews, folder=str(folder), ours=first_ours, last=4)
        if first_ours:
            outcomes = crews(2).run(train, Asked(folder=str(folder), ours=False), timeout=LONG)
            assert all("invalid load key" in one.message or "npickl" in one.message for one in outcomes), outcomes
            exported = export(folder / "saved", folder / "exported" / "saved")
            assert exported.name == "global_step4"
            folder = folder / "exported"
        again = ends(crews, folder=str(folder), ours=not first_ours, seed=3)
        assert [(one.first, one.end) for one in again] == [(4, one.end) for one in plain]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_to_fp32_of_an_export_agrees_with_that_of_plain_deepspeed(
    stage: int, crews: Crews, tmp_path: Path
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from asyncckpt.integrations.deepspeed import export

    for ours in (False, True):
        ends(crews, folder=str(tmp_path / str(ours)), ours=ours, stage=stage, last=2)
    export(tmp_path / "True" / "saved", tmp_path / "exported")
    found, expected = (
        get_fp32_state_dict_from_zero_checkpoint(str(one))
        for one in (tmp_path / "exported", tmp_path / "False" / "saved")
    )
    assert digest(dict(found)) == digest(dict(expected))
    with pytest.raises(asyncckpt.RunPathError):
        export(tmp_path / "True" / "saved", tmp_path / "exported")


def test_another_number_of_ranks_goes_on_where_deepspeed_lets_it(crews: Crews, tmp_path: Path) -> None:
    for ours in (False, True):
        ends(crews, folder=str(tmp_path / str(ours)), ours=ours, stage=0, last=4)
    found, expected = (
        ends(crews, 1, folder=str(tmp_path / str(ours)), ours=ours, stage=0, seed=4)[0].end for ours in (True, False)
    )
    assert found == expected
    ends(crews, folder=str(tmp_path / "zero"), stage=2, last=2)
    outcome = crews(1).run(train, Asked(folder=str(tmp_path / "zero"), stage=2), timeout=LONG)[0]
    assert "world size" in outcome.message
    assert outcome.failed_with("ZeRORuntimeException")


def test_tags_are_loaded_by_name_and_going_back_takes_nobodys_place(crews: Crews, tmp_path: Path) -> None:
    folder = str(tmp_path)
    whole = ends(crews, folder=folder)
    again = ends(crews, folder=folder, tag="global_step2", last=3, every=1)
    assert again[0].first == 2
    runs = {one.name: [entry.names for entry in asyncckpt.Run(one).ls()] for one in (tmp_path / "saved").glob("async*")}
    assert runs == {
        "asyncckpt-run": [("global_step2",), ("global_step4",), ("global_step6",)],
        "asyncckpt-run-2": [("global_step3",)],
    }
    later = ends(crews, folder=folder, tag="global_step4", seed=1)
    assert [one.end for one in later] == [one.end for one in whole]


def test_latest_stays_where_it_is_not_to_be_written_and_a_tag_moves(crews: Crews, tmp_path: Path) -> None:
    arguments = {"tag": "best", "save_latest": False}
    ends(crews, folder=str(tmp_path), arguments=arguments, last=4)
    assert not (tmp_path / "saved" / "latest").exists()
    assert ends(crews, folder=str(tmp_path), tag="best", last=4)[0].first == 4


def test_tags_go_with_the_checkpoints_that_retention_deletes(crews: Crews, tmp_path: Path) -> None:
    options = {"keep": asyncckpt.KeepLast(1)}
    (tmp_path / "saved" / "mine").mkdir(parents=True)
    ends(crews, folder=str(tmp_path), options=options)
    # a checkpoint that another rank still reads as retention comes is deleted after the next save
    kept = {f"global_step{entry.step}" for entry in Run(tmp_path / "saved" / "asyncckpt-run").ls()}
    assert "global_step6" in kept
    assert "global_step2" not in kept
    assert {one.name for one in (tmp_path / "saved").iterdir() if one.is_dir()} == {"asyncckpt-run", "mine", *kept}


def test_what_could_only_be_pickled_is_refused_on_all_ranks(crews: Crews, tmp_path: Path) -> None:
    outcomes = crews(2).run(_odd_client_state, Asked(folder=str(tmp_path)), timeout=LONG)
    assert outcomes[0].failed_with("UnsupportedValue"), outcomes
    assert outcomes[1].failed_with("SaveFailed"), outcomes
    assert "UnsupportedValue" in outcomes[1].message
    assert not (tmp_path / "saved" / "latest").exists()


def _odd_client_state(me: Me, asked: Asked) -> None:
    from frameworks.deepspeed_trainings import engine_of

    from asyncckpt.integrations.deepspeed import attach

    engine = engine_of(asked)
    attach(engine)
    engine.save_checkpoint(f"{asked.folder}/saved", client_state={"odd": object()})


def test_files_of_others_are_not_replaced(crews: Crews, tmp_path: Path) -> None:
    ends(crews, folder=str(tmp_path), ours=False, last=2)
    shutil.copytree(tmp_path / "saved", tmp_path / "before")
    outcomes = crews(2).run(train, Asked(folder=str(tmp_path), resume=False, last=2), timeout=LONG)
    assert all(one.failed_with("RunPathError") and "another tag" in one.message for one in outcomes), outcomes
    mine, theirs = tmp_path / "saved" / "global_step2", tmp_path / "before" / "global_step2"
    assert {one.name: one.read_bytes() for one in mine.iterdir()} == {
        one.name: one.read_bytes() for one in theirs.iterdir()
    }


def test_values_of_deepspeeds_own_come_back_and_no_others_are_made() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    from asyncckpt.integrations.deepspeed.values import from_plain, to_plain

    scaler = DynamicLossScaler(2.0, 10, 1.0, 2, False, dtype=torch.half)
    given = {"a": [ZeroStageEnum.weights, (fragment_address(3, 4), scaler)], 5: torch.Size([2])}
    found = from_plain(to_plain(given, "file"), "file")
    assert found["a"][0] is ZeroStageEnum.weights
    assert found["a"][1][0] == fragment_address(3, 4)
    assert vars(found["a"][1][1]) == vars(scaler)
    assert type(found[5]) is torch.Size
    for forged in ({"deepspeed-class": "os.system", "value": {}}, {"deepspeed-class": "LossScaler", "value": 3}):
        with pytest.raises(asyncckpt.CheckpointDamaged):
            from_plain(forged, "file")


def test_example_goes_on(crews: Crews, tmp_path: Path) -> None:
    script = Path(__file__).parent.parent.parent / "examples" / "deepspeed_loop.py"
    for steps, first in ((10, 0), (15, 10)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        command += ["--out", str(tmp_path / "saved"), "--steps", str(steps)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=False, env=environment)
        assert f"steps {first} to {steps}" in done.stdout, done.stderr[-4000:]


@pytest.mark.parametrize(("stage", "dtype"), [(1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_the_import_of_zero_agrees_with_zero_to_fp32(stage: int, dtype: str, crews: Crews, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    ends(crews, folder=str(tmp_path), stage=stage, dtype=dtype, ours=False, last=4)
    done = import_checkpoint(tmp_path / "saved", tmp_path / "run", 4)
    wanted = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "saved"))
    found = Run(tmp_path / "run").load(component="model")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)
    assert any(f"ZeRO {stage}, 2 ranks" in note for note in done.notes)
