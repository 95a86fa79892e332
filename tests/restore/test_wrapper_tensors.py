"""Tensors of subclasses that wrap others come back to the bit, into the live tensor of the same class, or are refused
by their name, with something to do about it."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from asyncckpt import Checkpointer, Run, StateMismatch, UnsupportedValue
from asyncckpt.events import SaveStarted
from asyncckpt.testing import SlowOps


class Codes(torch.Tensor):
    """Numbers as codes of one byte with scales, and a context that says how: a quantised tensor."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, mode: Any = "signed") -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, mode: Any = "signed") -> None:
        self.codes, self.scale, self.mode = codes, scale, mode

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], {"mode": self.mode}

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Codes:
        return cls(inner["codes"], inner["scale"], context["mode"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name in ("detach", "clone", "_to_copy", "alias"):  # a copy, as some classes make for a state_dict
            return cls(args[0].codes.clone(), args[0].scale.clone(), args[0].mode)
        raise NotImplementedError(func)


class OtherCodes(Codes):
    """Has the same tensors inside, and means another thing."""


class Opaque(torch.Tensor):
    """Computes its values, and does not say from what."""

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype)

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(args[0].value)


class Mode(enum.Enum):
    ROW = "row"
    BLOCK = "block"


def codes(seed: int, mode: Any = "signed", kind: type[Codes] = Codes, rows: int = 6) -> Codes:
    draw = torch.Generator().manual_seed(seed)
    return kind(torch.randint(255, (rows, 4), dtype=torch.uint8, generator=draw), torch.rand(3, generator=draw), mode)


def parts(value: Any) -> list[torch.Tensor]:
    names = value.__tensor_flatten__()[0] if hasattr(type(value), "__tensor_flatten__") else None
    return [value] if names is None else [leaf for name in names for leaf in parts(getattr(value, name))]


def same(first: Any, second: Any) -> bool:
    pairs = list(zip(parts(first), parts(second), strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


class Keeps(torch.optim.SGD):
    """An optimizer whose state is what a test wants."""

    def fill(self, make: Any) -> None:
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            self.state[parameter]["moment"] = make(number)


#: ``Keeps`` is found by this module, which names the classes of tensors: an optimizer's own code does.
def training(make: Any = None) -> dict[str, Any]:
    model = nn.Linear(4, 6)
    optimizer = Keeps(model.parameters(), lr=0.1)
    if make is not None:
        optimizer.fill(make)
    return {"model": model, "optimizer": optimizer}


def moments(state: dict[str, Any]) -> list[Any]:
    return [values["moment"] for values in state["optimizer"].state.values()]


def quantised(seed: int, **options: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(seed)
    model[0].weight = nn.Parameter(codes(seed, **options), requires_grad=False)
    return model


def saved(path: Path, state: dict[str, Any], step: int = 1, **options: Any) -> Run:
    with Checkpointer(path, **options) as run:
        run.save(step, state).result()
    return Run(path)


# -- optimizers ------------------------------------------------------------------------------------------------------


def test_a_new_optimizers_state_is_made_again_in_its_class(tmp_path: Path) -> None:
    state = training(codes)
    saved(tmp_path, state)
    new = training()
    Run(tmp_path).restore(new)
    assert [type(one) for one in moments(new)] == [Codes, Codes]
    assert all(map(same, moments(new), moments(state)))
    assert moments(new)[0].mode == "signed"


def test_live_state_is_filled_in_place(tmp_path: Path) -> None:
    state = training(codes)
    saved(tmp_path, state)
    new = training(lambda number: codes(number + 50))
    kept = moments(new)
    inner = [one.codes for one in kept]
    Run(tmp_path).restore(new)
    assert all(map(same, moments(new), moments(state)))
    assert all(now is before for now, before in zip(moments(new), kept, strict=True))
    assert all(now.codes is before for now, before in zip(moments(new), inner, strict=True))


def test_two_levels_of_wrappers_come_back(tmp_path: Path) -> None:
    def make(number: int) -> Any:
        draw = torch.Generator().manual_seed(number)
        a, b, c, d = (torch.rand(6, 4, generator=draw) for _ in range(4))
        return TwoTensor(TwoTensor(a, b), TwoTensor(c, d))

    state = training(make)
    saved(tmp_path, state)
    names = [name for name in Run(tmp_path).load_tensors() if name.startswith("optimizer.state.weight")]
    assert sorted(names) == [f"optimizer.state.weight.moment.{one}.{two}" for one in "ab" for two in "ab"]
    for new in (training(lambda number: make(number + 9)), training()):
        Run(tmp_path).restore(new)
        assert all(map(same, moments(new), moments(state)))
        assert type(moments(new)[0].a) is TwoTensor


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda number: codes(number, "unsigned"), "context"),
        (lambda number: codes(number, kind=OtherCodes), "OtherCodes"),
        (lambda number: codes(number, rows=5), "shape"),
        (lambda number: Codes(codes(number).codes, torch.rand(7)), "scale inside"),
        (lambda number: Codes(codes(number).codes, torch.rand(3).double()), "scale inside"),
        (lambda number: torch.rand(6, 4), "live is a plain tensor"),
        (lambda number: TwoTensor(torch.rand(6, 4), torch.rand(6, 4)), "TwoTensor"),
    ],
)
def test_live_state_of_another_kind_is_a_mismatch_and_stays(tmp_path: Path, other: Any, what: str) -> None:
    state = training(codes)
    saved(tmp_path, state)
    new = training(lambda number: other(number + 50))
    before = [[part.clone() for part in parts(one)] for one in moments(new)]
    with pytest.raises(StateMismatch, match=what) as refused:
        Run(tmp_path).restore(new)
    assert "optimizer.weight" in str(refused.value)
    assert "moment" in str(refused.value)
    report = Run(tmp_path).restore(new, strict=False)
    assert len(report.mismatched) == 2
    for was, now in zip(before, moments(new), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(was, parts(now), strict=True)), "half of it was restored"


def test_plain_state_does_not_go_into_a_wrapper(tmp_path: Path) -> None:
    saved(tmp_path, training(lambda number: torch.rand(6, 4) if number == 0 else torch.rand(6)))
    new = training(codes)
    with pytest.raises(StateMismatch, match=r"saved as a plain torch\.float32 tensor, live a Codes"):
        Run(tmp_path).restore(new)
    fresh = training()  # the way out: an optimizer as it was
    assert Run(tmp_path).restore(fresh).whole


def test_a_class_that_the_optimizer_cannot_name_is_a_mismatch(tmp_path: Path) -> None:
    class Hidden(Codes):
        pass

    saved(tmp_path, training(lambda number: codes(number, kind=Hidden)))
    with pytest.raises(StateMismatch, match="does not know"):
        Run(tmp_path).restore(training())
    live = training(lambda number: codes(number + 9, kind=Hidden))  # the way out that it names
    assert Run(tmp_path).restore(live).whole


def test_a_context_of_the_programs_types_is_compared_with_the_live_one(tmp_path: Path) -> None:
    saved(tmp_path, training(lambda number: codes(number, Mode.ROW)))
    assert Run(tmp_path).restore(training(lambda number: codes(number + 1, Mode.ROW))).whole
    with pytest.raises(StateMismatch, match="context"):
        Run(tmp_path).restore(training(lambda number: codes(number, Mode.BLOCK)))
    with pytest.raises(StateMismatch, match="by a step, before restoring"):
        Run(tmp_path).restore(training())


# -- modules ---------------------------------------------------------------------------------------------------------


def test_a_modules_wrapper_is_filled_in_place(tmp_path: Path) -> None:
    model, new = quantised(1), quantised(2)
    saved(tmp_path, {"model": model})
    held, inner = new[0].weight, new[0].weight.codes
    assert Run(tmp_path).restore({"model": new}).whole
    assert new[0].weight is held
    assert held.codes is inner
    assert same(held, model[0].weight)
    assert torch.equal(new[1].weight, model[1].weight)


def test_tied_wrappers_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    def tied(seed: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6))
        model[0].weight = model[1].weight = nn.Parameter(codes(seed), requires_grad=False)
        return model

    model, new = tied(1), tied(2)
    run = saved(tmp_path, {"model": model})
    loaded = run.load_tensors()
    assert loaded["model.0.weight.codes"] is loaded["model.1.weight.codes"]
    assert run.restore({"model": new}).whole
    assert new[0].weight is new[1].weight
    assert same(new[0].weight, model[0].weight)


def test_a_wrapper_under_another_name_comes_back_by_rename(tmp_path: Path) -> None:
    model = quantised(1)
    saved(tmp_path, {"model": model})
    new = nn.ModuleDict({"body": quantised(2)})
    Run(tmp_path).restore({"net": new}, rename={"model.": "net.body."})
    assert same(new["body"][0].weight, model[0].weight)


@pytest.mark.parametrize("options", [{"mode": "unsigned"}, {"kind": OtherCodes}, {"rows": 6, "mode": ["a"]}])
def test_a_module_that_was_quantised_otherwise_is_a_mismatch_and_stays(tmp_path: Path, options: Any) -> None:
    saved(tmp_path, {"model": quantised(1)})
    new = quantised(2, **options)
    with pytest.raises(StateMismatch, match=r"model\.0\.weight: saved as a Codes"):
        Run(tmp_path).restore({"model": new})
    assert same(new[0].weight, codes(2, **options))
    report = Run(tmp_path).restore({"model": new}, strict=False)
    assert len(report.mismatched) == 1
    assert not report.unexpected
    assert not report.missing
    assert same(new[0].weight, codes(2, **options))
    assert new[1].weight[0, 0] == 1


def test_a_plain_model_and_a_quantised_checkpoint_say_what_to_do(tmp_path: Path) -> None:
    saved(tmp_path / "quantised", {"model": quantised(1)})
    plain = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    with pytest.raises(StateMismatch, match="quantise it in the same way") as refused:
        Run(tmp_path / "quantised").restore({"model": plain})
    assert refused.value.mismatched
    assert not refused.value.missing
    assert not refused.value.unexpected
    saved(tmp_path / "plain", {"model": plain})
    with pytest.raises(StateMismatch, match="quantise the model after restoring it"):
        Run(tmp_path / "plain").restore({"model": quantised(2)})


def test_frozen_wrappers_are_not_written_again(tmp_path: Path) -> None:
    model = quantised(1)
    with Checkpointer(tmp_path) as run:
        run.save(1, {"model": model}).result()
        with torch.no_grad():
            model[1].weight.add_(1)
        report = run.save(2, {"model": model}).result()
        first, second = ({f.name: f.stat().st_ino for f in (tmp_path / f"step-0000000{n}").iterdir()} for n in (1, 2))
    assert report is not None
    kept = [name for name in first if name.startswith("model-") and first[name] == second.get(name)]
    assert kept, "the frozen tensors inside lie in a file of their own"


# -- other components ------------------------------------------------------------------------------------------------


class Tracker:
    """An object with a state of its own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"deep": [self.value]} if self.value is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["deep"][0]


def test_wrappers_in_plain_data_objects_and_alone(tmp_path: Path) -> None:
    state = {"plain": {"a": [codes(1)]}, "object": Tracker(codes(2)), "alone": codes(3)}
    saved(tmp_path, state)
    new = {"plain": {"a": [codes(11)]}, "object": Tracker(codes(12)), "alone": codes(13)}
    alone = new["alone"]
    assert Run(tmp_path).restore(new).whole
    assert same(new["plain"]["a"][0], codes(1))
    assert type(new["plain"]["a"][0]) is Codes
    assert same(new["object"].value, codes(2))
    assert same(alone, codes(3))


def test_plain_data_of_which_nothing_lives_is_a_dict(tmp_path: Path) -> None:
    saved(tmp_path, {"plain": {"a": codes(1)}})
    new: dict[str, Any] = {"plain": {}}
    Run(tmp_path).restore(new)
    found = new["plain"]["a"]
    assert torch.equal(found["tensors"]["codes"], codes(1).codes)
    assert found["context"] == {"mode": "signed"}
    assert found["shape"] == (6, 4)
    assert found["dtype"] is torch.float32


def test_an_object_in_which_nothing_lives_is_a_mismatch(tmp_path: Path) -> None:
    saved(tmp_path, {"object": Tracker(codes(1))})
    with pytest.raises(StateMismatch, match="nothing is live at its place"):
        Run(tmp_path).restore({"object": Tracker(None)})


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "where", "what"),
    [
        (lambda: Opaque(torch.ones(2)), r"\['plain'\]\['a'\]|plain.*a", "__tensor_flatten__"),
        (lambda: codes(1, lambda: None), r"\['context'\]\['mode'\]", "cannot be stored"),
        (lambda: codes(1, torch.ones(2)), r"\['context'\]\['mode'\]", "not plain"),
        (lambda: TwoTensor(Opaque(torch.ones(2)), Opaque(torch.ones(2))), "a.a", "Opaque"),
        (lambda: TwoTensor(torch.ones(2, device="meta"), torch.ones(2, device="meta")), "a.a", "meta"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_its_path(tmp_path: Path, value: Any, where: str, what: str) -> None:
    with Checkpointer(tmp_path) as run:
        with pytest.raises(UnsupportedValue, match=where) as refused:
            run.save(1, {"plain": {"a": value()}})
        assert what in str(refused.value)


def test_stored_bytes_never_go_into_a_tensor_without_bytes(tmp_path: Path) -> None:
    saved(tmp_path, {"plain": {"a": torch.ones(6, 4)}, "alone": torch.ones(6, 4)})
    with pytest.raises(StateMismatch, match="alone"):
        Run(tmp_path).restore({"alone": codes(1)})
    live = {"plain": {"a": codes(1)}}
    Run(tmp_path).restore(live)  # plain data is replaced
    assert torch.equal(live["plain"]["a"], torch.ones(6, 4))


def test_a_save_with_wrappers_says_format_version_4(tmp_path: Path) -> None:
    saved(tmp_path, {"plain": {"a": codes(1)}})
    assert '"format_version":4' in (tmp_path / "step-00000001" / "manifest.json").read_text()


# -- deferral --------------------------------------------------------------------------------------------------------


class Steps(Keeps):
    """Changes the tensors inside of its state in place at each step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for values in self.state.values():
            values["moment"].codes.add_(1)
            values["moment"].scale.mul_(1.5)


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_inside_a_watched_optimizers_state_is_deferred_and_right(tmp_path: Path, count: int) -> None:
    state: dict[str, Any] = {}
    optimizers = []
    for number in range(count):
        # frozen parameters are never deferred, so what is deferred is inside of wrappers
        model = nn.Linear(4, 6, bias=False).requires_grad_(False)
        optimizer = Steps(model.parameters(), lr=0.1)
        optimizer.fill(lambda _: Codes(torch.zeros(512, 512, dtype=torch.uint8), torch.ones(1 << 16)))
        state |= {f"model{number}": model, f"optimizer{number}": optimizer}
        optimizers.append(optimizer)
    held, deferred = {}, []
    with Checkpointer(tmp_path) as run:
        run._store.ops = SlowOps(0.01)
        run.watch(*optimizers)
        run.events.subscribe(lambda event: deferred.append(event.deferred) if isinstance(event, SaveStarted) else None)
        for step in range(1, 6):
            held[step] = [
                (f"optimizer{number}.state.weight.moment.{name}", getattr(one, name).clone())
                for number, optimizer in enumerate(optimizers)
                for one in moments({"optimizer": optimizer})
                for name in ("codes", "scale")
            ]
            pending = run.save(step, state)
            for optimizer in optimizers:
                optimizer.step()
            pending.result()
    assert any(deferred[1:]), "nothing was deferred, so nothing was tried"
    for step, expected in held.items():
        loaded = Run(tmp_path).load_tensors(step)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected), step
