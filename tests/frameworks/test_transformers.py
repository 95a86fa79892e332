"""A ``Trainer`` with the mixin trains, saves, stops and resumes as one without it does, to the bit."""

from __future__ import annotations

import os
import random
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from frameworks.killing import in_child
from frameworks.on_ranks import on_ranks
from support import scripts

from asyncckpt import CheckpointDamaged, InvalidOption, KeepEvery, NoUsableCheckpoint, Run, StateMismatch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from support.tiny_transformers import (
        AsyncCheckpointMixin,
        AsyncTrainer,
        StopAt,
        bits,
        model,
        same,
        trained,
        trainer,
    )

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]
TESTS = Path(__file__).parents[1]


def _folders(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine", "weight_decay": 0.1},
        {"save_strategy": "epoch", "max_steps": 20, "warmup_steps": 2},
        {"optim": "sgd", "max_grad_norm": 0.1, "dataloader_num_workers": 1},
    ],
    ids=["plain", "cosine", "epochs", "workers"],
)
def test_a_run_that_stopped_ends_as_one_that_did_not(options: dict[str, Any], tmp_path: Path) -> None:
    unbroken = trained(tmp_path / "plain", transformers.Trainer, **options)
    stopped = trained(tmp_path / "ours", **options, callbacks=[StopAt(8)])
    assert stopped.state.global_step == 8
    resumed = trained(tmp_path / "ours", **options, resume=True)
    assert same(bits(resumed), bits(unbroken))
    saved_by_stopping = {"checkpoint-8"} if options.get("save_strategy") == "epoch" else set()
    assert _folders(tmp_path / "ours") == _folders(tmp_path / "plain") | saved_by_stopping
    assert resumed.state.global_step == unbroken.state.global_step
    assert all(Run(tmp_path / "ours").verify(entry.step) == [] for entry in Run(tmp_path / "ours").ls())


def test_from_pretrained_opens_a_checkpoint_and_the_plain_trainer_refuses_it(tmp_path: Path) -> None:
    ours = trained(tmp_path)
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert same(found.state_dict(), ours.model.state_dict())
    with pytest.raises(Exception, match="asyncckpt export --trainer"):
        trained(tmp_path, transformers.Trainer, resume=True, max_steps=20)


def test_what_export_makes_the_plain_trainer_resumes_from(tmp_path: Path) -> None:
    from asyncckpt.cli import main

    unbroken = trained(tmp_path / "plain", transformers.Trainer)
    trained(tmp_path / "ours", callbacks=[StopAt(8)])
    out = tmp_path / "exported" / "checkpoint-6"
    out.parent.mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["asyncckpt", "export", "--trainer", str(tmp_path / "ours"), "6", str(out)])
        main()
    assert not ended.value.code
    resumed = trained(tmp_path / "exported", transformers.Trainer, resume=True)
    assert same(bits(resumed), bits(unbroken))


def test_a_checkpoint_of_the_plain_trainer_is_gone_on_from(tmp_path: Path) -> None:
    unbroken = trained(tmp_path / "plain", transformers.Trainer)
    trained(tmp_path / "mixed", transformers.Trainer, callbacks=[StopAt(8)])
    resumed = trained(tmp_path / "mixed", resume=True)
    assert same(bits(resumed), bits(unbroken))
    assert _folders(tmp_path / "mixed") == {"checkpoint-3", "checkpoint-6", "checkpoint-9", "checkpoint-12"}
    assert {entry.step for entry in Run(tmp_path / "mixed").ls()} == {9, 12}


def test_a_kill_in_mid_save_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    options = {"max_steps": 8, "save_steps": 1, "save_total_limit": 2}
    unbroken = bits(trained(tmp_path / "plain", transformers.Trainer, **options))

    def train(folder: Path) -> None:
        resumed = trained(folder, resume=bool(folder.exists() and Run(folder).ls()), **options)
        torch.save(bits(resumed), folder / "bits.pt")

    _, calls = in_child(lambda: train(tmp_path / "counted"))
    # not in the last save: a trainer that resumes from its last step, the plain one too, makes one step more
    for at in random.Random(5).sample(range(calls // 8, calls * 6 // 8), 6):
        folder = tmp_path / str(at)
        killed, _ = in_child(lambda folder=folder: train(folder), kill_at=at)  # type: ignore[misc]
        assert killed
        in_child(lambda folder=folder: train(folder))  # type: ignore[misc]
        assert same(torch.load(folder / "bits.pt"), unbroken)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_same_checkpoints_are_kept_and_the_best_comes_back(limit: int, tmp_path: Path) -> None:
    losses = {3: 0.5, 6: 0.2, 9: 0.9, 12: 0.7}
    options: dict[str, Any] = {
        "save_total_limit": limit,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }

    class Judged:
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            metrics = {"eval_loss": losses[self.state.global_step]}  # type: ignore[attr-defined]
            self.log(dict(metrics))  # type: ignore[attr-defined]
            return metrics

    def ran(name: str, *bases: type[Any]) -> Any:
        kind = type("Kind", (Judged, *bases), {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("time.sleep", lambda _: None)
            return trained(tmp_path / name, kind, **options, eval_dataset=[1])

    plain, ours = ran("plain", transformers.Trainer), ran("ours", AsyncTrainer)
    assert same(ours.model.state_dict(), plain.model.state_dict())
    assert Path(ours.state.best_model_checkpoint).name == Path(plain.state.best_model_checkpoint).name == "checkpoint-6"
    newest = {"checkpoint-12"}  # where the limit is 1, the plain trainer deletes the one that a resume needs
    assert _folders(tmp_path / "ours") == _folders(tmp_path / "plain") | newest
    entry = next(one for one in Run(tmp_path / "ours").ls() if one.step == 6)
    assert entry.metrics["eval_loss"] == 0.2


def test_the_best_alone_are_saved_where_that_is_asked_for(tmp_path: Path) -> None:
    losses = dict(zip(range(2, 13, 2), (0.9, 0.5, 0.7, 0.4, 0.8, 0.6), strict=True))

    class Judged:
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            metrics = {"eval_loss": losses[self.state.global_step]}  # type: ignore[attr-defined]
            self.log(dict(metrics))  # type: ignore[attr-defined]
            return metrics

    options: dict[str, Any] = {
        "save_strategy": "best",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": [1],
    }
    plain = trained(tmp_path / "plain", type("Kind", (Judged, transformers.Trainer), {}), **options)
    kind = type("Kind", (Judged, AsyncTrainer), {})
    trained(tmp_path / "ours", kind, **options, callbacks=[StopAt(5)])
    ours = trained(tmp_path / "ours", kind, **options, resume=True)
    assert same(ours.model.state_dict(), plain.model.state_dict())
    assert (
        _folders(tmp_path / "ours") == _folders(tmp_path / "plain") == {"checkpoint-2", "checkpoint-4", "checkpoint-8"}
    )
    assert Path(ours.state.best_model_checkpoint).name == "checkpoint-8"


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    options: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager"}
    unbroken = trained(tmp_path / "plain", transformers.Trainer, **options)
    trained(tmp_path / "ours", **options, callbacks=[StopAt(8)])
    resumed = trained(tmp_path / "ours", **options, resume=True)
    assert same(bits(resumed), bits(unbroken))
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-12")
    assert same(opened.state_dict(), resumed.model.state_dict())


def test_a_base_whose_saving_would_be_left_out_is_refused(tmp_path: Path) -> None:
    class Writes(transformers.Trainer):  # type: ignore[misc]
        def _save_checkpoint(self, *arguments: Any) -> None:
            raise AssertionError

    class Weights(AsyncTrainer):
        def save_model(self, *arguments: Any, **options: Any) -> None:
            raise AssertionError

    class Mixed(AsyncCheckpointMixin, Writes):
        pass

    for kind, called in ((Mixed, "Writes._save_checkpoint"), (Weights, "Weights.save_model")):
        with pytest.raises(InvalidOption, match=called):
            trained(tmp_path / called, kind)
        kind.replaced_methods = {called}
        trained(tmp_path / called, kind, max_steps=3)
        assert _folders(tmp_path / called) == {"checkpoint-3"}


def test_a_damaged_newest_checkpoint_is_told_of_and_the_one_before_is_used(tmp_path: Path) -> None:
    unbroken = trained(tmp_path / "plain", transformers.Trainer)
    trained(tmp_path / "ours", callbacks=[StopAt(10)])
    for name in ("optimizer-00001-of-00001.safetensors", "trainer_state.json"):
        file = tmp_path / "ours" / "checkpoint-9" / name
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
        with pytest.warns(RuntimeWarning, match="checkpoint-9 cannot be used"):
            resumed = trained(tmp_path / "ours", resume=True)
        assert same(bits(resumed), bits(unbroken))
        for later in (9, 12):
            shutil.rmtree(tmp_path / "ours" / f"checkpoint-{later}")
        trained(tmp_path / "ours", resume=True, callbacks=[StopAt(10)])


def test_where_no_checkpoint_is_usable_training_does_not_begin_anew(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=3)
    os.truncate(tmp_path / "checkpoint-3" / "manifest.json", 100)
    with pytest.raises((NoUsableCheckpoint, CheckpointDamaged)):
        trained(tmp_path, resume=True)


def test_a_new_start_does_not_run_into_the_checkpoints_of_another_run(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=3)
    with pytest.raises(InvalidOption, match="resume_from_checkpoint=True"):
        trained(tmp_path)
    assert _folders(tmp_path) == {"checkpoint-3"}


def test_only_the_model_is_saved_where_that_is_asked_for_and_not_resumed_from(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=3, save_only_model=True)
    assert Run(tmp_path).ls()[0].nbytes < 200_000
    assert not (tmp_path / "checkpoint-3" / "optimizer.pt").exists()
    with pytest.raises(StateMismatch, match="optimizer"):
        trained(tmp_path, max_steps=6, resume=True)


def test_an_adapter_is_saved_without_its_base_and_resumed_to_the_bit(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        return peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))

    unbroken = trained(tmp_path / "plain", transformers.Trainer, of=adapted())
    trained(tmp_path / "ours", of=adapted(), callbacks=[StopAt(8)])
    resumed = trained(tmp_path / "ours", of=adapted(), resume=True)
    assert same(bits(resumed), bits(unbroken))
    opened = peft.PeftModel.from_pretrained(model(), tmp_path / "ours" / "checkpoint-12")
    assert same(opened.state_dict(), resumed.model.state_dict())
    assert not list((tmp_path / "ours" / "checkpoint-12").glob("model*.safetensors"))


def test_what_a_subclass_adds_comes_back_and_callbacks_go_on(tmp_path: Path) -> None:
    class Counting(transformers.TrainerCallback, transformers.trainer_callback.ExportableState):  # type: ignore[misc]
        def __init__(self, seen: int = 0) -> None:
            self.seen = seen

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seen += 1

        def state(self) -> dict[str, Any]:
            return {"args": {"seen": self.seen}, "attributes": {}}

    class Averaging(AsyncTrainer):
        average: torch.Tensor

        def checkpoint_state(self) -> dict[str, Any]:
            return {"average": self.average}

    def ran(name: str, resume: bool, *more: Any) -> Any:
        one = trainer(
            str(tmp_path / name), Averaging, callbacks=[Counting(), *more], restore_callback_states_from_checkpoint=True
        )
        one.average = torch.zeros(3)
        if not resume:
            one.average += 7
        one.train(resume_from_checkpoint=resume)
        return one

    ran("ours", False, StopAt(8))
    resumed = ran("ours", True)
    assert resumed.average.tolist() == [7.0] * 3
    (counting,) = (one for one in resumed.callback_handler.callbacks if isinstance(one, Counting))
    assert counting.seen == 12


def test_damage_that_a_save_finds_does_not_send_training_back(tmp_path: Path) -> None:
    class Finds(AsyncTrainer):
        begun = 0

        def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
            self.begun += 1
            return super()._prepare_for_training(*arguments, **options)

        def _save_checkpoint(self, *arguments: Any) -> None:
            if self.state.global_step == 12:
                raise CheckpointDamaged("what has not changed was to be taken over, but is damaged")
            super()._save_checkpoint(*arguments)

    trained(tmp_path, callbacks=[StopAt(8)])
    resumed = trainer(str(tmp_path), Finds)
    with pytest.raises(CheckpointDamaged, match="taken over"):
        resumed.train(resume_from_checkpoint=True)
    assert (resumed.begun, resumed.state.global_step) == (1, 12)


def test_options_are_taken_in_each_form_that_a_checkpointer_takes(tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("a note")

    class Configured(AsyncTrainer):
        given = {"keep": KeepEvery(6), "assets": [str(note)]}  # noqa: RUF012  it must not be changed

        def checkpointer_options(self) -> dict[str, Any]:
            return self.given

    for options in ({"callbacks": [StopAt(8)]}, {"resume": True}):
        trained(tmp_path / "run", Configured, save_total_limit=1, **options)
    assert _folders(tmp_path / "run") == {"checkpoint-6", "checkpoint-12"}
    assert Run(tmp_path / "run").assets(12)["note.txt"] == b"a note"


def test_a_failed_save_is_raised_by_train(tmp_path: Path) -> None:
    class Full(AsyncTrainer):
        def _save_checkpoint(self, *arguments: Any) -> None:
            super()._save_checkpoint(*arguments)
            if self.state.global_step == 6:
                shutil.rmtree(tmp_path / "run")

    with pytest.raises(Exception, match="run"):
        trained(tmp_path / "run", Full)


def test_the_example_goes_on_where_it_was(tmp_path: Path) -> None:
    example = TESTS.parent / "examples" / "transformers_trainer.py"
    assert "step 5 is saved" in scripts.run(example, "--out", tmp_path, "--steps", "5")
    assert "step 8 is saved" in scripts.run(example, "--out", tmp_path, "--steps", "8")
    assert [entry.step for entry in Run(tmp_path).ls()] == [7, 8]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_that_stopped_end_as_those_that_did_not(kind: str, tmp_path: Path) -> None:
    """They go on from the plain trainer's checkpoint, too; the plain trainer does so from an export, and refuses
    what is not exported."""
    assert on_ranks("transformers_on_ranks.py", tmp_path, kind) == [[True, True, True, True]] * 2
    run = Run(tmp_path / "ours")
    assert [entry.step for entry in run.ls()] == [3, 6, 9, 12]
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-12")
    assert opened.state_dict()["model.embed_tokens.weight"].shape == (64, 16)
