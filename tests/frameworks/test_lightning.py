"""Lightning saves and resumes through asyncckpt as it does by itself."""

from __future__ import annotations

import errno
import os
import pickle
import random
from pathlib import Path
from typing import Any

import lightning
import omegaconf
import pytest
import torch
from conftest import bits
from frameworks.killing import in_child
from frameworks.lightning_trainings import Model, fit
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import asyncckpt
from asyncckpt.integrations.lightning import AsyncckptCallback, AsyncckptIO, RandomState, export, load_from_checkpoint
from asyncckpt.testing import FaultyOps, GatedOps

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("default")]


def test_resumed_training_ends_as_plain_lightnings_unbroken_one(tmp_path: Path) -> None:
    unbroken, _ = fit(tmp_path / "plain", [])
    fit(tmp_path / "ours", [AsyncckptIO()], epochs=2)
    resumed, trainer = fit(tmp_path / "ours", [AsyncckptIO()], ckpt_path="last")
    assert trainer.global_step == 20
    assert bits(resumed) == bits(unbroken)


def test_killed_in_the_middle_of_saves_it_resumes_and_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    def train(folder: Path, plugins: list[Any], **options: Any) -> None:
        model, _ = fit(folder, plugins, **options)
        torch.save(model.state_dict(), folder / "end.pt")

    in_child(lambda: train(tmp_path / "plain", []))
    unbroken = bits(torch.load(tmp_path / "plain" / "end.pt"))
    _, calls = in_child(lambda: train(tmp_path / "ours", [AsyncckptIO()]))
    seed = int(os.environ.get("ASYNCCKPT_SEED", "0")) or random.randrange(1 << 30)
    points = sorted(random.Random(seed).sample(range(2, calls), 6))
    for point in points:
        folder = tmp_path / f"killed-{point}"
        killed, _ = in_child(lambda folder=folder: train(folder, [AsyncckptIO()], ckpt_path="last"), point)
        assert killed
        in_child(lambda folder=folder: train(folder, [AsyncckptIO()], ckpt_path="last"))
        assert bits(torch.load(folder / "end.pt")) == unbroken, f"killed at call {point} of {calls}, seed {seed}"


def names(folder: Path) -> list[str]:
    """The checkpoints that Lightning sees."""
    return sorted(path.name for path in folder.glob("*.ckpt"))


@pytest.mark.parametrize(
    "options",
    [
        {"monitor": "loss", "save_top_k": 2, "save_last": True, "every_n_train_steps": 2},
        {"monitor": "loss", "save_top_k": 2, "save_last": "link", "every_n_epochs": 1},
        {"monitor": "loss", "save_top_k": -1, "mode": "max", "every_n_train_steps": 4},
        {"save_top_k": 0, "save_last": True, "every_n_train_steps": 3},
        {"monitor": "loss", "save_top_k": 3, "filename": "best", "every_n_train_steps": 2},
        {"save_top_k": 1, "save_last": "link", "every_n_train_steps": 2, "filename": "one"},
    ],
    ids=str,
)
def test_model_checkpoint_leaves_the_same_names_and_each_loads_what_plain_lightning_has(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    found = {}
    for kind in ("plain", "ours"):
        folder = tmp_path / kind
        checkpoints = ModelCheckpoint(dirpath=folder, **options)
        plugin = AsyncckptIO()
        fit(folder, [plugin] if kind == "ours" else [], checkpoints=checkpoints)
        found[kind] = {}
        for name in names(folder):
            read = plugin.load_checkpoint(folder / name, weights_only=False)
            if options.get("save_last") is True:  # of one step saved twice, ours has the first: see the next test
                next(iter(read["callbacks"].values())).pop("last_model_path")
            found[kind][name] = repr(bits(read)).replace(str(folder), "")
    assert found["ours"] == found["plain"]
    folder = tmp_path / "ours" / "asyncckpt-run"
    steps = {entry.step for entry in asyncckpt.Run(folder).ls()}
    live = {AsyncckptIO().load_checkpoint(tmp_path / "ours" / name)["global_step"] for name in found["ours"]}
    assert steps == live | {max(steps)}, "what Lightning has removed is still there"


def test_last_one_of_a_step_that_was_just_saved_is_a_link(tmp_path: Path) -> None:
    fit(tmp_path, [AsyncckptIO()])
    assert (tmp_path / "last.ckpt").is_symlink()
    entries = asyncckpt.Run(tmp_path / "asyncckpt-run").ls()
    assert len(entries) == len({entry.step for entry in entries})
    assert AsyncckptIO().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 18


@pytest.mark.parametrize("change", ["weights", "replaced", "value", "name", "step"])
def test_last_one_of_another_state_is_saved_by_itself(tmp_path: Path, change: str) -> None:
    weights, value = torch.zeros(9), {"loops": [1, 2]}
    plugin = AsyncckptIO()
    plugin.save_checkpoint({"global_step": 1, "state_dict": {"w": weights}, "value": value}, tmp_path / "a.ckpt")
    if change == "weights":
        weights += 1
    if change == "replaced":
        del weights
        weights = torch.ones(9)
    if change == "value":
        value["loops"].append(3)
    name = "b.ckpt" if change == "name" else "last.ckpt"
    step = 2 if change == "step" else 1
    plugin.save_checkpoint({"global_step": step, "state_dict": {"w": weights}, "value": value}, tmp_path / name)
    plugin.teardown()
    assert not (tmp_path / name).is_symlink()
    read = plugin.load_checkpoint(tmp_path / name)
    assert (read["global_step"], read["value"]) == (step, value)
    assert torch.equal(read["state_dict"]["w"], weights)


def test_link_to_a_save_that_fails_gives_way_to_the_last_one_before(tmp_path: Path) -> None:
    plugin = AsyncckptIO()
    states = [{"global_step": step, "value": torch.full((9,), float(step))} for step in (1, 2)]
    plugin.save_checkpoint(states[0], tmp_path / "a.ckpt")
    plugin.save_checkpoint(states[0], tmp_path / "last.ckpt")
    run = plugin._runs[tmp_path]._checkpointer
    run.wait()
    faulty = FaultyOps()
    faulty.fail = ("rename_noreplace", 1, errno.EIO)
    run._store.ops = faulty  # type: ignore[attr-defined]
    plugin.save_checkpoint(states[1], tmp_path / "b.ckpt")
    plugin.save_checkpoint(states[1], tmp_path / "last.ckpt")
    with pytest.raises(asyncckpt.AsyncCkptError):
        plugin.teardown()
    assert names(tmp_path) == ["a.ckpt", "last.ckpt"]
    assert AsyncckptIO().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1


def test_best_loads_and_training_that_goes_back_takes_no_checkpoints_place(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(dirpath=tmp_path, monitor="loss", save_top_k=-1, every_n_train_steps=4)
    _, trainer = fit(tmp_path, [AsyncckptIO()], checkpoints=checkpoints)
    model = Model()
    trainer.test(model, DataLoader(torch.zeros(4, 8), 4), ckpt_path="best", verbose=False)
    assert bits(model) == bits(dict(AsyncckptIO().load_checkpoint(checkpoints.best_model_path)["state_dict"]))

    before = {name: bits(AsyncckptIO().load_checkpoint(tmp_path / name)) for name in names(tmp_path)}
    assert len(before) == 5
    early = next(path for path in tmp_path.glob("*step=4.ckpt"))
    again = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=4, save_last=True)
    fit(tmp_path, [AsyncckptIO()], ckpt_path=early, checkpoints=again)
    assert len(names(tmp_path)) == 10
    assert {name: bits(AsyncckptIO().load_checkpoint(tmp_path / name)) for name in before} == before
    assert AsyncckptIO().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 20


def test_random_numbers_and_the_order_of_a_plain_loader_come_back(tmp_path: Path) -> None:
    def train(folder: Path, epochs: int, ckpt_path: str | None = None) -> Any:
        torch.manual_seed(7)
        model = Model(dropout=0.3)
        data = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
        if ckpt_path:
            torch.randn(5)  # a resumed process has drawn other numbers so far
        trainer = lightning.Trainer(
            max_epochs=epochs,
            plugins=[AsyncckptIO()],
            callbacks=[ModelCheckpoint(dirpath=folder, save_last=True), RandomState()],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(data, 4, shuffle=True), ckpt_path=ckpt_path)
        return bits(model)

    unbroken = train(tmp_path / "unbroken", 4)
    train(tmp_path / "resumed", 2)
    assert train(tmp_path / "resumed", 4, "last") == unbroken


def test_callback_saves_at_our_cadence_and_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    def train(path: Path, epochs: int, **options: Any) -> tuple[Any, AsyncckptCallback]:
        callback = AsyncckptCallback(path, every=4, keep=asyncckpt.KeepLast(2))
        torch.manual_seed(0)
        model, _ = fit(
            path,
            [],
            checkpoints=callback,
            callbacks=(RandomState(),),
            epochs=epochs,
            ckpt_path=callback.newest(),
            model=Model(dropout=0.2),
            **options,
        )
        return bits(model), callback

    unbroken, _ = train(tmp_path / "unbroken", 4)
    assert [entry.step for entry in asyncckpt.Run(tmp_path / "unbroken").ls()] == [16, 20]
    train(tmp_path / "resumed", 4, max_steps=9)
    resumed, callback = train(tmp_path / "resumed", 4)
    assert resumed == unbroken
    assert asyncckpt.Run(callback.path).newest().metrics.keys() >= {"epoch", "loss"}


def test_plain_lightnings_checkpoint_goes_on_with_ours(tmp_path: Path) -> None:
    unbroken, _ = fit(tmp_path / "unbroken", [])
    fit(tmp_path / "changed", [], epochs=2)
    resumed, _ = fit(tmp_path / "changed", [AsyncckptIO()], ckpt_path="last")
    assert bits(resumed) == bits(unbroken)


def test_plain_lightning_refuses_ours_as_it_is_and_goes_on_with_an_export(tmp_path: Path) -> None:
    unbroken, _ = fit(tmp_path / "unbroken", [])
    fit(tmp_path / "changed", [AsyncckptIO()], epochs=2)
    with pytest.raises(pickle.UnpicklingError):
        fit(tmp_path / "changed", [], ckpt_path="last")
    export(tmp_path / "changed" / "last.ckpt", tmp_path / "exported.ckpt")
    resumed, _ = fit(tmp_path / "plain", [], ckpt_path=tmp_path / "exported.ckpt")
    assert bits(resumed) == bits(unbroken)
    with pytest.raises(asyncckpt.RunPathError, match="exists"):
        export(tmp_path / "changed" / "last.ckpt", tmp_path / "exported.ckpt")


def test_load_from_checkpoint_gives_the_module_with_its_hyper_parameters(tmp_path: Path) -> None:
    trained, _ = fit(tmp_path, [AsyncckptIO()], model=Model(width=24), epochs=3)
    loaded = load_from_checkpoint(Model, tmp_path / "last.ckpt")
    assert loaded.hparams.width == 24
    assert bits(loaded.state_dict()) == bits(trained.state_dict())


def test_omegaconf_hyper_parameters_come_back_as_omegaconf(tmp_path: Path) -> None:
    class Configured(Model):
        def __init__(self, config: Any) -> None:
            super().__init__(config.width)
            self.save_hyperparameters(config)

    config = omegaconf.OmegaConf.create({"width": 16, "twice": "${width}", "sizes": [1, 2]})
    fit(tmp_path, [AsyncckptIO()], model=Configured(config))
    checkpoint = AsyncckptIO().load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["hyper_parameters"] == config
    assert type(checkpoint["hyper_parameters"]["sizes"]) is omegaconf.ListConfig
    assert omegaconf.OmegaConf.to_yaml(checkpoint["hyper_parameters"]) == omegaconf.OmegaConf.to_yaml(config)
    assert checkpoint["hparams_type"] is omegaconf.DictConfig


def test_weights_of_compiled_parts_are_stored_by_their_own_names(tmp_path: Path) -> None:
    class Compiled(Model):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    unbroken, _ = fit(tmp_path / "plain", [], model=Compiled())
    fit(tmp_path / "ours", [AsyncckptIO()], epochs=2, model=Compiled())
    names = asyncckpt.Run(tmp_path / "ours" / "asyncckpt-run").load()["model"].keys()
    assert "net.0.weight" in names
    assert not [name for name in names if "_orig_mod" in name]
    resumed, _ = fit(tmp_path / "ours", [AsyncckptIO()], ckpt_path="last", model=Compiled())
    assert bits(resumed) == bits(unbroken)


def test_plugin_is_pickled_without_what_it_has_open(tmp_path: Path) -> None:
    plugin = AsyncckptIO(files="zarr")
    plugin.save_checkpoint({"global_step": 1, "state_dict": {"w": torch.ones(3)}}, tmp_path / "a.ckpt")
    other = pickle.loads(pickle.dumps(plugin))
    plugin.teardown()
    other.save_checkpoint({"global_step": 2, "state_dict": {"w": torch.ones(3)}}, tmp_path / "b.ckpt")
    other.teardown()
    assert (tmp_path / "asyncckpt-run" / "step-00000002" / "zarr.json").exists()


def test_removed_checkpoint_stays_until_the_one_that_takes_its_place_is_durable(tmp_path: Path) -> None:
    plugin = AsyncckptIO()
    plugin.save_checkpoint({"global_step": 1, "value": torch.zeros(9)}, tmp_path / "step=1.ckpt")
    gate = GatedOps()
    run = plugin._runs[tmp_path]._checkpointer
    run.wait()
    run._store.ops = gate  # type: ignore[attr-defined]
    plugin.save_checkpoint({"global_step": 2, "value": torch.ones(9)}, tmp_path / "step=2.ckpt")
    plugin.remove_checkpoint(tmp_path / "step=1.ckpt")
    assert (tmp_path / "step=1.ckpt").exists()
    assert AsyncckptIO().load_checkpoint(tmp_path / "step=1.ckpt")["value"].sum() == 0
    gate.gate.set()
    plugin.teardown()
    assert names(tmp_path) == ["step=2.ckpt"]
    assert [entry.step for entry in asyncckpt.Run(tmp_path / "asyncckpt-run").ls()] == [2]


@pytest.mark.parametrize("kind", ["plugin", "callback"])
def test_two_ranks_of_ddp_resume_and_end_as_the_unbroken_ones(tmp_path: Path, kind: str) -> None:
    def train(path: Path, epochs: int = 4) -> Any:
        callback = AsyncckptCallback(path, every=4)
        model, _ = fit(
            path,
            [AsyncckptIO()],
            epochs=epochs,
            checkpoints=callback if kind == "callback" else None,
            ckpt_path=callback.newest() if kind == "callback" else "last",
            devices=2,
            strategy="ddp_fork",
            use_distributed_sampler=False,
        )
        return bits(model)

    unbroken = train(tmp_path / "unbroken")
    train(tmp_path / "resumed", epochs=2)
    assert train(tmp_path / "resumed") == unbroken
