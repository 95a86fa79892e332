"""Everything a training state can hold comes back bit for bit."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny, bits, train
from torch import nn

from asyncckpt import Checkpointer, RngState, Safetensors, UnsupportedValue
from asyncckpt.state.dtypes import CODES

PARAMS = [nn.Parameter(torch.zeros(1))]
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam-amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "AdamW": torch.optim.AdamW,
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)),
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "Rprop": torch.optim.Rprop,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "ASGD": torch.optim.ASGD,
    "Adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_continues_exactly_where_it_was(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Tiny()
    groups = [
        {"params": [model.embed.weight], "weight_decay": 0.1},
        {"params": [*model.hidden.parameters(), *model.norm.parameters()], "lr": 0.01},
    ]
    optimizer = make(groups)
    train(model, optimizer, 3)
    with Checkpointer(tmp_path / "run") as run:
        state = {"model": model, "optimizer": optimizer, "rng": RngState()}
        run.save(3, state).result()
        train(model, optimizer, 2)
        expected = bits([model, optimizer])

        torch.manual_seed(99)
        fresh = Tiny()
        other = make(
            [
                {"params": [fresh.embed.weight]},
                {"params": [*fresh.hidden.parameters(), *fresh.norm.parameters()]},
            ]
        )
        assert run.resume({"model": fresh, "optimizer": other, "rng": RngState()}) == 3
        train(fresh, other, 2)
        assert bits([fresh, other]) == expected


def test_lbfgs_with_lists_of_tensors_in_its_state(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    data = torch.randn(8, 4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(data).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"model": model, "optimizer": optimizer}).result()
        expected = bits([model, optimizer])
        optimizer.step(closure)
        assert bits([model, optimizer]) != expected
        run.restore({"model": model, "optimizer": optimizer})
        assert bits([model, optimizer]) == expected


SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=50),
    "CosineWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.9**s),
    "Plateau": torch.optim.lr_scheduler.ReduceLROnPlateau,
    "Sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_any_scheduler_continues_exactly_where_it_was(make: Any, tmp_path: Path, tiny: Any) -> None:
    model, optimizer = tiny
    scheduler = make(optimizer)
    step = (lambda s: s.step(1.0)) if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else _step
    optimizer.step()
    for _ in range(4):
        step(scheduler)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, state).result()
        for _ in range(3):
            step(scheduler)
        expected = [group["lr"] for group in optimizer.param_groups]
        run.restore(state)
        for _ in range(3):
            step(scheduler)
        assert [group["lr"] for group in optimizer.param_groups] == expected


def _step(scheduler: Any) -> None:
    scheduler.step()


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 0, 3)], ids=str)
def test_every_dtype_and_odd_shapes(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    count = torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"t": tensor, "tree": {"inner": [tensor, 5]}}).result()
        loaded = run.load_tensors(1)
        assert bits(loaded["t.value"]) == bits(tensor)
        assert bits(loaded["tree.inner.0"]) == bits(tensor)
        live = torch.zeros(shape, dtype=torch.float32).to(dtype)
        state = {"t": live, "tree": {}}
        run.restore(state)
        assert bits(live) == bits(tensor)
        assert bits(state["tree"]) == bits({"inner": [tensor, 5]})


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path, tiny: Any) -> None:
    model, optimizer = tiny
    with Checkpointer(tmp_path / "run") as run:
        path = Path(run.save(1, {"model": model, "optimizer": optimizer}).result().path)
        header = (path / "model-00002-of-00002.safetensors").read_bytes()[:4096]
        assert b'"embed.weight"' in header
        assert b'"head.weight"' not in header
        expected = bits(model)
        train(model, optimizer)
        run.restore({"model": model})
        assert bits(model) == expected
        assert model.head.weight is model.embed.weight
        untied = Tiny()
        untied.head.weight = nn.Parameter(torch.zeros_like(untied.head.weight))
        run.restore({"model": untied})
        assert bits(untied) == expected


def test_rng_of_python_numpy_torch_and_own_generators(tmp_path: Path) -> None:
    own = {"np": np.random.default_rng(3), "py": random.Random(4), "torch": torch.Generator().manual_seed(5)}
    rng = RngState(own)

    def draw() -> list[Any]:
        return [
            random.gauss(0, 1),
            np.random.standard_normal(),
            torch.rand(2).tolist(),
            own["np"].random(),
            own["py"].random(),
            torch.rand(1, generator=own["torch"]).item(),
        ]

    draw()  # gauss keeps a spare value: state beyond the words
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"rng": rng}).result()
        expected = draw()
        draw()
        run.restore({"rng": rng})
        assert draw() == expected


def test_grad_scaler_ema_hparams_metrics_and_loader(tmp_path: Path, tiny: Any) -> None:
    model, optimizer = tiny
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    ema.update_parameters(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))  # its scale tensor is made lazily

    class Loader:
        position = 7

        def state_dict(self) -> dict[str, Any]:
            return {"position": self.position, "buffer": torch.arange(self.position), "seen": {1, 2}}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            assert state["buffer"].tolist() == list(range(state["position"]))
            self.position = state["position"]

    loader = Loader()
    shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {
        "model": model,
        "optimizer": optimizer,
        "ema": ema,
        "scaler": scaler,
        "loader": loader,
        "shadow": shadow,
        "hparams": {"lr": 0.1, "betas": (0.9, 0.95), "dtype": torch.bfloat16, 3: b"x"},
        "epoch": 4,
    }
    before = copy.deepcopy({key: bits(value) for key, value in state.items()})
    with Checkpointer(tmp_path / "run", config={"experiment": "a"}) as run:
        report = run.save(5, state, metrics={"loss": torch.tensor(0.5), "acc": np.float32(0.25)}).result()
        assert run.ls()[0].metrics == {"loss": 0.5, "acc": 0.25}
        train(model, optimizer)
        ema.update_parameters(model)
        loader.position = 1
        kept = shadow["embed.weight"]
        kept.zero_()
        scaler.update(2.0)
        state["hparams"].clear()
        state["epoch"] = 9
        run.restore(state)
        assert report.step == 5
        assert {key: bits(value) for key, value in state.items()} == before
        assert state["shadow"]["embed.weight"] is kept, "live tensors are filled in place"


def test_module_with_extra_state_and_compiled_wrapper(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        note: Any = None

        def get_extra_state(self) -> Any:
            return {"note": self.note}

        def set_extra_state(self, state: Any) -> None:
            self.note = state["note"]

    model = nn.Sequential(Extra(2, 2))
    model[0].note = (1, float("inf"))
    compiled = torch.compile(model)
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"model": compiled}).result()
        fresh = nn.Sequential(Extra(2, 2))
        run.restore({"model": fresh})
        assert fresh[0].note == (1, float("inf"))
        assert bits(fresh[0].weight) == bits(model[0].weight)


def test_a_custom_state_dict_that_gives_copies_is_given_them_back(tmp_path: Path) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = torch.arange(3)

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[prefix + "packed"] = self.packed.clone()

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            self.packed = state_dict[prefix + "packed"].clone()

    model = nn.ModuleDict({"a": Packed()})
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"model": model}).result()
        model["a"].packed = torch.zeros(3, dtype=torch.int64)
        run.restore({"model": model})
        assert model["a"].packed.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"model": torch.eye(3).to_sparse()}, r"state\['model'\].*sparse.*to_dense"),
        ({"x": {"a": [1, {"b": object()}]}}, r"state\['x'\]\['a'\]\[1\]\['b'\]"),
        ({"x": torch.zeros(2, dtype=torch.complex128)}, "complex128.*view_as_real"),
        ({"x": torch.zeros(2, device="meta")}, "meta device"),
        ({"x": {"f": lambda: 0}}, r"state\['x'\]\['f'\]"),
    ],
)
def test_what_cannot_be_stored_is_named(state: Any, where: str, run: Checkpointer) -> None:
    with pytest.raises(UnsupportedValue, match=where):
        run.save(1, state)
    run.save(1, {"fine": 1}).result()  # the step is still free


def test_an_optimizer_over_parameters_without_a_name_is_refused(run: Checkpointer) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], momentum=0.9)
    with pytest.raises(UnsupportedValue, match="no component of the state"):
        run.save(1, {"optimizer": optimizer})


def test_two_optimizers_over_two_modules(tmp_path: Path) -> None:
    gen, dis = nn.Linear(2, 2), nn.Linear(2, 2)  # equal names in both
    both = torch.optim.Adam([*gen.parameters(), *dis.parameters()])
    own = torch.optim.SGD(dis.parameters(), lr=0.1, momentum=0.9)
    state = {"gen": gen, "dis": dis, "both": both, "own": own}
    for _ in range(2):
        (gen(torch.randn(1, 2)) + dis(torch.randn(1, 2))).sum().backward()
        both.step()
        own.step()
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, state).result()
        expected = bits([gen, dis, both, own])
        both.step()
        own.step()
        run.restore(state)
        assert bits([gen, dis, both, own]) == expected


def test_the_same_state_gives_the_same_data_bytes(tmp_path: Path, tiny: Any) -> None:
    model, optimizer = tiny
    state = {"model": model, "optimizer": optimizer, "hparams": {"tags": {"b", "a"}}}
    reordered = dict(reversed(state.items()))
    seen = []
    for number, one in enumerate((state, reordered)):
        with Checkpointer(tmp_path / f"run{number}", files=Safetensors(shard_bytes=2000)) as run:
            path = Path(run.save(1, one).result().path)
        seen.append(
            {f.name: f.read_bytes() for f in path.iterdir() if f.name != "manifest.json" and "state" not in f.name}
        )
    assert len(seen[0]) > 4
    assert seen[0] == seen[1]


def test_safetensors_and_index_open_as_they_are(tmp_path: Path, tiny: Any) -> None:
    import json

    from safetensors.torch import load_file

    model, optimizer = tiny
    with Checkpointer(tmp_path / "run", files=Safetensors(shard_bytes=1000)) as run:
        path = Path(run.save(1, {"model": model, "optimizer": optimizer}).result().path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    merged: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        merged |= load_file(path / file)
    assert len(set(index["weight_map"].values())) > 2
    assert set(merged) == set(index["weight_map"])
    live = model.state_dict()
    assert all(torch.equal(live[name], tensor) for name, tensor in merged.items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    fresh = Tiny()
    missing = fresh.load_state_dict(merged, strict=False)
    assert missing.missing_keys == ["head.weight"]  # tied: the other name of embed.weight
    assert not missing.unexpected_keys
