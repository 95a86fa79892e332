"""A snapshot on the device is the state at ``save``, whatever training does from then on, in the files that the host
way writes. A stand-in on the CPU takes the device's place; at the end, the same on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits
from hypothesis import given
from hypothesis import strategies as st
from support.deferring import with_momentum
from support.drawn_states import drawn_state
from support.examples import examples
from support.options import by_stage
from support.queued_copies import Landed, until
from support.snapshot_device import PATIENCE_SECONDS, StandIn, device_options, on_a_device

from asyncckpt import (
    Checkpointer,
    InvalidOption,
    NotEnoughMemory,
    NotEnoughSpace,
    Safetensors,
    SaveAbandoned,
    SaveFailed,
    StagingOptions,
    WriterOptions,
)
from asyncckpt.events import Event, SnapshotOnHost, Stalled
from asyncckpt.stage import device_snapshot, landing
from asyncckpt.stage.gather import Gather
from asyncckpt.stage.image_plan import ImagePlan
from asyncckpt.types import Segment

MIB = 1 << 20


class CopiedByAddress:
    """Copies memory by its address, as Triton's kernel does. ``made``: so many tables were made."""

    made = 0

    def __init__(self, image: torch.Tensor, addresses: Sequence[int], places: Sequence[int], sizes: Sequence[int]):
        CopiedByAddress.made += 1
        self._image = image
        self._rows = list(zip(addresses, places, sizes, strict=True))

    def launch(self) -> None:
        for address, place, nbytes in self._rows:
            ctypes.memmove(self._image.data_ptr() + place, address, nbytes)


TABLES = [None, CopiedByAddress]


def _files(checkpoint: Path) -> dict[str, str]:
    found = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


class Loop:
    """A loop of 4 MiB whose snapshots are taken on a stand-in."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch, *, watch: bool = False, **options: Any) -> None:
        self.model, self.optimizer = with_momentum(256, 8)
        self.state = {"model": self.model, "optimizer": self.optimizer}
        self.events: list[Event] = []
        staging = device_options(**options)
        writer = WriterOptions(reuse_unchanged=False, durable_timeout_seconds=600)
        self.run = Checkpointer(path, staging=staging, writer=writer, on_event=self.events.append)
        self.device = on_a_device(patch, self.run, StandIn())
        if watch:
            self.run.watch(self.optimizer)
        self.run.prepare(self.state)
        assert self.run._arena.wait_prepared(PATIENCE_SECONDS)

    def values(self) -> Any:
        return bits(self.model.state_dict())

    def saved(self, step: int) -> Any:
        found = self.run.load_tensors(step, ["model"])
        return {name.removeprefix("model."): bits(tensor) for name, tensor in found.items()}

    def holds(self, step: int, expected: Any) -> bool:
        return self.run.verify(step) == [] and self.saved(step) == expected


# -- the same files ----------------------------------------------------------------------------------------------------


@examples(40)
@given(data=st.data())
def test_files_are_those_of_the_host_way_byte_by_byte(data: st.DataObject) -> None:
    state = drawn_state(data)
    options: dict[str, Any] = {
        "format": data.draw(st.sampled_from(["safetensors", "zarr"])),
        "extent_bytes": data.draw(st.sampled_from([4 << 10, 64 << 10, 8 << 20])),
        "incremental": data.draw(st.booleans()),
    }
    device = StandIn(make_table=data.draw(st.sampled_from(TABLES)))
    device.of_host = [tensor for tensor in state.values() if data.draw(st.booleans())]
    budget = data.draw(st.sampled_from([None, 1 << 20]))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        found = []
        patch.setattr(device_snapshot, "_CHUNK_BYTES", data.draw(st.sampled_from([4 << 10, 64 << 20])))
        for name in ("host", "device"):
            options["staging"] = StagingOptions(snapshot=name, budget_bytes=budget)  # type: ignore[arg-type]
            with Checkpointer(Path(folder) / name, **by_stage(**dict(options))) as run:
                if name == "device":
                    on_a_device(patch, run, device)
                for step in (1, 2):
                    run.save(step, {"t": state}).result(PATIENCE_SECONDS)
                run.wait()
                assert run.verify(1) == run.verify(2) == []
            found.append([_files(Path(folder) / name / f"step-{step:08}") for step in (1, 2)])
        assert found[0] == found[1]
        assert "gather" in device.ran or not any(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize("make_table", TABLES)
@pytest.mark.parametrize("codec", ["planes", "zstd", "auto"])
@pytest.mark.parametrize("shard_format", ["safetensors", "zarr"])
def test_chunks_for_a_codec_come_back_bit_for_bit(
    shard_format: str, codec: str, make_table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    state = {
        "fp32": torch.randn(307, 211),
        "bf16": torch.randn(501, 103).to(torch.bfloat16),
        "strided": torch.randn(150, 300).t(),
        "tiny": torch.randn(5),
        "scalar": torch.tensor(3.5),
    }
    options = by_stage(format=shard_format, codec=codec, extent_bytes=64 << 10)
    with Checkpointer(tmp_path / "run", staging=device_options(), **options) as run:
        on_a_device(monkeypatch, run, StandIn(make_table=make_table))
        for step in (1, 2):
            expected = {f"t.{name}": bits(tensor) for name, tensor in state.items()}
            run.save(step, {"t": state}).result(PATIENCE_SECONDS)
            assert run.verify(step) == []
            assert {name: bits(tensor) for name, tensor in run.load_tensors(step).items()} == expected
            for tensor in state.values():
                tensor.add_(1)


def test_weights_and_the_whole_state_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has headers and zeros of its own where the other has tensors."""
    loop = Loop(tmp_path / "run", monkeypatch)
    for step in range(1, 7):
        expected = loop.values()
        loop.run.save(step, loop.state, weights_only=step % 3 == 2).result(PATIENCE_SECONDS)
        assert loop.holds(step, expected)
        loop.optimizer.step()
    assert len(loop.device.allocated) == 2, "memory for the image and for the flags is allocated once"
    loop.run.close()


@pytest.mark.parametrize("make_table", TABLES)
def test_what_a_tensor_was_before_says_nothing(
    make_table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of these states, each has its headers where another has values, or tensors at the same address that are another
    one's conjugates or parts."""
    values = torch.randn(300, dtype=torch.complex64)
    states = [
        {"t": values},
        {"t": values.conj()},
        {"longer name of a tensor": values[:7], "t": torch.zeros(2000)},
        {"t": values},
        {"t": values.conj().imag, "u": values.real},
        {"t": values.conj()},
    ]
    with Checkpointer(tmp_path / "run", staging=device_options()) as run:
        on_a_device(monkeypatch, run, StandIn(make_table=make_table))
        for step, state in enumerate(states, 1):
            run.save(step, {"s": state}).result(PATIENCE_SECONDS)
            assert run.verify(step) == []
            found = {name: bits(tensor) for name, tensor in run.load_tensors(step).items()}
            assert found == {f"s.{name}": bits(tensor) for name, tensor in state.items()}
            header = next((tmp_path / "run" / f"step-{step:08}").glob("*.safetensors")).read_bytes()[:4096]
            assert all(name.encode() in header for name in state)


@pytest.mark.parametrize("make_table", TABLES)
def test_who_vouches_for_addresses_and_forms_has_not_looked_for_conjugates(make_table: Any) -> None:
    values = torch.randn(50, dtype=torch.complex64)
    imaginary = values.imag.clone()
    nbytes = values.nbytes + imaginary.nbytes
    segments = (Segment(0, 0, 0, values.nbytes), Segment(1, 0, values.nbytes, imaginary.nbytes))
    image = torch.zeros(nbytes, dtype=torch.uint8)
    gather = Gather(ImagePlan((0,), segments, (), nbytes), image, lambda _: True, make_table)
    vouched = object()
    for first in (values, values.conj(), values):
        for second in (imaginary, torch._neg_view(imaginary), imaginary):
            gather.enqueue([first, second], vouched)
            assert image.numpy().tobytes() == bits(first)[-1] + bits(second)[-1]


@pytest.mark.parametrize("process", ["never", "always"])
def test_who_writes_makes_no_difference(process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path / "other", monkeypatch)
    with Checkpointer(tmp_path / "run", staging=device_options(), writer=WriterOptions(process=process)) as run:
        loop.run.close()
        loop.run, loop.device = run, on_a_device(monkeypatch, run, StandIn())
        for step in (1, 2, 3):
            expected = loop.values()
            pending = run.save(step, loop.state)
            loop.optimizer.step()
            pending.result(PATIENCE_SECONDS)
            assert loop.holds(step, expected)


# -- the state of the moment -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("watch", [False, True])
def test_the_state_is_that_at_save_whatever_changes_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: bool
) -> None:
    loop = Loop(tmp_path / "run", monkeypatch, watch=watch)
    for step in (1, 2, 3):
        expected = loop.values()
        loop.device.hold("drain")
        drains = loop.device.ran.count("drain")
        pending = loop.run.save(step, loop.state)
        assert pending.staged(0.0), "training may go on"
        for parameter in loop.model.parameters():
            parameter.data.mul_(0.5)
        loop.optimizer.step()
        with torch.no_grad():
            loop.model[0].weight.data = torch.zeros_like(loop.model[0].weight)
        loop.optimizer.load_state_dict(loop.optimizer.state_dict())
        assert loop.device.ran.count("drain") == drains
        loop.device.release()
        pending.result(PATIENCE_SECONDS)
        assert loop.holds(step, expected)
    assert {event.where for event in loop.events if isinstance(event, Stalled)} <= {"save"}
    loop.run.close()


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_what_is_kept_is_of_use_in_every_mode_of_autograd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Any
) -> None:
    loop = Loop(tmp_path / "run", monkeypatch)
    loop.device.of_host = [loop.model[3].weight]
    with first():
        loop.run.save(1, loop.state).result(PATIENCE_SECONDS)
    for step in (2, 3):
        loop.optimizer.step()
        expected = loop.values()
        loop.run.save(step, loop.state).result(PATIENCE_SECONDS)
        assert loop.holds(step, expected)
    loop.run.close()


def test_what_is_enqueued_and_in_which_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_snapshot, "_CHUNK_BYTES", 128 << 10)
    loop = Loop(tmp_path / "run", monkeypatch)
    for step in (1, 2):
        loop.device.enqueued.clear()
        loop.run.save(step, loop.state)
        kinds = list(loop.device.enqueued)  # all of it inside ``save``
        constants = ["fill"] if step == 1 else []
        begin = [*constants, "gather", "fill"]
        assert kinds[: len(begin)] == begin
        rest = kinds[len(begin) :]
        assert rest[-1] == "flag"
        assert set(rest) == {"drain", "tick", "flag"}
        for at, kind in enumerate(rest):
            if kind == "drain":
                assert rest[at + 1] == "tick", "training's own small copies would wait"
            elif kind == "flag":
                assert rest[at - 1] == "tick"
        assert rest.count("drain") >= 4 * MIB // (128 << 10)
        loop.run.wait()
    loop.run.close()


def test_views_and_tables_are_kept_and_addresses_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path / "run", monkeypatch)
    loop.device.make_table = CopiedByAddress
    before = CopiedByAddress.made
    for step, made in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3)):
        if step == 3:
            loop.model[1].weight.data = loop.model[1].weight.data.clone()
        if step == 5:
            loop.model[1].weight.data = loop.model[1].weight.data.t()
        expected = loop.values()
        loop.run.save(step, loop.state).result(PATIENCE_SECONDS)
        assert loop.holds(step, expected)
        assert CopiedByAddress.made - before == made
        for parameter in loop.model.parameters():
            parameter.data.add_(1)
    assert len(loop.device.allocated) == 2, "memory for the image and for the flags is allocated once"
    loop.run.close()


# -- what fails --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_device", [True, False])
def test_a_save_that_fails_while_copies_are_queued_gives_no_memory_back_before_they_have_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_device: bool
) -> None:
    loop = Loop(tmp_path / "run", monkeypatch)
    loop.run.save(1, loop.state).result(PATIENCE_SECONDS)
    loop.run.wait()
    loop.run._store.ops = ops = Landed(lambda: "flag" in loop.device.enqueued)
    loop.device.enqueued.clear()
    ops.full = True
    loop.device.hold("drain")
    failed = loop.run.save(2, loop.state)
    assert isinstance(failed.exception(PATIENCE_SECONDS), NotEnoughSpace)
    arena = loop.run._arena
    assert not until(lambda: arena.free_bytes() > 0, 0.3), "a slot was given back under a queued copy"
    ops.full = False
    ops.landed.set()
    loop.optimizer.step()
    expected = loop.values()
    if same_device:
        saving: list[Any] = []
        # the stand-in has training wait for the gathering, which runs behind what is held
        thread = threading.Thread(target=lambda: saving.append(loop.run.save(3, loop.state)))
        thread.start()
        loop.device.release()
        thread.join()
        saving[0].result(PATIENCE_SECONDS)
    else:
        loop.device.release()
        assert until(lambda: arena.free_bytes() == arena.budget_bytes), "it never comes back"
        loop.run.save(3, loop.state).result(PATIENCE_SECONDS)
    assert loop.holds(3, expected)
    loop.run.close()


@pytest.mark.parametrize("kind", ["gather", "drain", "flag"])
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: 700"), torch.OutOfMemoryError("no memory")])
def test_an_error_of_the_device_fails_the_save_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: Exception
) -> None:
    loop = Loop(tmp_path / "run", monkeypatch)
    loop.device.fails[kind] = error
    pending = loop.run.save(1, loop.state)
    if kind == "flag":  # then whoever waits asks the device itself
        pending.result(PATIENCE_SECONDS)
    else:
        found = pending.exception(PATIENCE_SECONDS)
        assert isinstance(found, SaveFailed)
        assert found.__cause__ is error
        way_out = "snapshot='host'" if isinstance(error, torch.OutOfMemoryError) else "Look at the device"
        assert way_out in str(found)
        assert "torage" not in str(found).replace("StagingOptions", "")
    del loop.device.fails[kind]
    arena = loop.run._arena
    assert until(lambda: arena.free_bytes() == arena.budget_bytes), "memory is lost"
    loop.run.save(2, loop.state).result(PATIENCE_SECONDS)
    assert loop.holds(2, loop.values())
    loop.run.close()


def test_a_device_that_ends_without_a_word_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landing, "_LOOK_SECONDS", 0.05)
    loop = Loop(tmp_path / "run", monkeypatch)
    loop.device.loses_flags = True
    error = loop.run.save(1, loop.state).exception(PATIENCE_SECONDS)
    assert isinstance(error, SaveFailed)
    assert "has not copied the snapshot" in str(error)
    loop.device.loses_flags = False
    loop.run.save(2, loop.state).result(PATIENCE_SECONDS)
    loop.run.close()


# -- room --------------------------------------------------------------------------------------------------------------


def test_where_host_memory_is_short_the_image_waits_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path / "run", monkeypatch, budget_bytes=MIB)
    for step in range(1, 5):
        expected = loop.values()
        pending = loop.run.save(step, loop.state)
        loop.optimizer.step()
        pending.result(PATIENCE_SECONDS)
        assert loop.holds(step, expected)
    loop.run.close()


def test_the_next_save_waits_until_the_image_is_on_its_way_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path / "run", monkeypatch, budget_bytes=MIB, stall_timeout_seconds=0.3)
    expected = loop.values()
    gate = loop.run._store.ops = Landed()
    first = loop.run.save(1, loop.state)
    loop.optimizer.step()
    second = loop.run.save(2, loop.state)
    gate.landed.set()
    error = second.exception(PATIENCE_SECONDS)
    assert isinstance(error, SaveAbandoned)
    assert "did not finish within its deadline" in str(error)
    first.result(PATIENCE_SECONDS)
    assert loop.holds(1, expected), "the second one must not have touched the image of the first"
    third = loop.values()
    loop.run.save(3, loop.state).result(PATIENCE_SECONDS)
    assert loop.holds(3, third)
    loop.run.close()


def test_too_little_room_on_the_device_is_an_error_that_says_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path / "run", monkeypatch)
    loop.device.free_bytes = (512 << 20) + MIB
    with pytest.raises(NotEnoughMemory, match=r"step 1: .* \d+ bytes .*536870912 .*537919488 are free.*'host'"):
        loop.run.save(1, loop.state)
    assert loop.device.allocated == []
    loop.device.free_bytes = 8 << 30
    loop.run.save(1, loop.state).result(PATIENCE_SECONDS)
    loop.run.close()


def test_auto_stays_on_the_host_until_the_other_way_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = StandIn()
    with Checkpointer(tmp_path / "run") as run:
        run._starter.snapshots.make_device = lambda _: pytest.fail("auto took the device")
        run.save(1, {"w": torch.zeros(1000)}).result(PATIENCE_SECONDS)
    monkeypatch.setattr(device_snapshot, "AUTO_TAKES_DEVICE", True)
    events: list[Event] = []
    with Checkpointer(tmp_path / "later", on_event=events.append) as run:
        on_a_device(monkeypatch, run, device)
        monkeypatch.setattr("asyncckpt.stage.streams.CopyStreams.of", lambda *_: _nothing_queued())
        monkeypatch.setattr("asyncckpt.saver.cuda_devices", lambda _: set())
        device.free_bytes = MIB
        for step in (1, 2):
            run.save(step, {"w": torch.zeros(1000)}).result(PATIENCE_SECONDS)
        assert device.ran == []
        device.free_bytes = 8 << 30
        run.save(3, {"w": torch.zeros(1000)}).result(PATIENCE_SECONDS)
        assert "gather" in device.ran
    (said,) = [event for event in events if isinstance(event, SnapshotOnHost)]
    assert (said.step, said.nbytes > 4000) == (1, True)
    assert "stay free" in said.reason


def _nothing_queued() -> Any:
    from asyncckpt.stage.streams import none_queued

    return none_queued()


def test_a_state_that_lies_on_no_device_is_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", staging=device_options()) as run:
        with pytest.raises(InvalidOption, match=r"step 4: .*snapshot='device'.* lies on none.*'auto'"):
            run.save(4, {"w": torch.zeros(1000)})
        run.save(4, {"note": "there is nothing to copy"}).result(PATIENCE_SECONDS)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(InvalidOption, match="'auto', 'device' or 'host', not 'gpu'"):
        StagingOptions(snapshot="gpu")  # type: ignore[arg-type]


def test_a_save_that_somebody_keeps_does_not_keep_the_device_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: list[weakref.ref[torch.Tensor]] = []
    loop = Loop(tmp_path / "run", monkeypatch)
    original = loop.device.memory

    def memory(nbytes: int) -> torch.Tensor:
        made = original(nbytes)
        images.append(weakref.ref(made))
        return made

    monkeypatch.setattr(loop.device, "memory", memory)
    pending = loop.run.save(1, loop.state)
    pending.result(PATIENCE_SECONDS)
    assert images[0]() is not None, "it is kept from save to save"
    loop.run.close()
    del loop
    gc.collect()
    assert until(lambda: images[0]() is None), "the device's memory is never given back"
    assert pending.done()


# -- on a device -------------------------------------------------------------------------------------------------------


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _gpu_state(width: int = 512) -> tuple[dict[str, Any], torch.optim.Optimizer]:
    model, optimizer = with_momentum(width, 6, "cuda")
    tensors = {
        "bf16": torch.randn(501, 103, device="cuda").to(torch.bfloat16),
        "strided": torch.randn(150, 300, device="cuda").t(),
        "odd": torch.arange(13, dtype=torch.uint8, device="cuda")[1:],
        "conjugated": torch.randn(64, dtype=torch.complex64, device="cuda").conj(),
        "of the host": torch.arange(100.0),
        "scalar": torch.tensor(3.5, device="cuda"),
    }
    return {"model": model, "optimizer": optimizer, "tensors": tensors}, optimizer


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("kernel", [True, False], ids=["triton", "torch"])
def test_on_a_gpu_files_are_those_of_the_host_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    if kernel:
        pytest.importorskip("triton")
    else:
        monkeypatch.setattr("asyncckpt.stage.device.table_maker", lambda: None)
    state, _ = _gpu_state()
    found = []
    for way in ("host", "device"):
        staging = StagingOptions(snapshot=way)  # type: ignore[arg-type]
        with Checkpointer(tmp_path / way, staging=staging, files=Safetensors(extent_bytes=64 << 10)) as run:
            for step in (1, 2):
                run.save(step, state).result(60)
            assert run.verify(2) == []
        found.append([_files(tmp_path / way / f"step-{step:08}") for step in (1, 2)])
    assert found[0] == found[1]


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("process", ["never", "always"])
def test_on_a_gpu_the_state_is_that_at_save(tmp_path: Path, process: Any) -> None:
    state, optimizer = _gpu_state()
    model = state["model"]
    with Checkpointer(
        tmp_path / "run", staging=device_options(), writer=WriterOptions(process=process, reuse_unchanged=False)
    ) as run:
        for step in range(1, 9):
            expected = bits({f"model.{name}": tensor for name, tensor in model.state_dict().items()})
            torch.cuda._sleep(20_000_000)
            pending = run.save(step, state)
            for parameter in model.parameters():
                parameter.data.mul_(0.5)
            optimizer.step()
            pending.result(60)
            assert run.verify(step) == []
            assert bits(run.load_tensors(step, ["model"])) == expected


@pytest.mark.cuda
@on_gpu
def test_on_a_gpu_saves_take_no_more_and_more_device_memory(tmp_path: Path) -> None:
    state, optimizer = _gpu_state()
    reserved = []
    with Checkpointer(tmp_path / "run", staging=device_options(), writer=WriterOptions(reuse_unchanged=False)) as run:
        for step in range(1, 41):
            run.save(step, state).result(60)
            optimizer.step()
            reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1], reserved


@pytest.mark.cuda
@on_gpu
def test_on_a_gpu_too_little_room_is_an_error_and_training_goes_on(tmp_path: Path) -> None:
    state, optimizer = _gpu_state()
    with Checkpointer(tmp_path / "run", staging=device_options()) as run:
        free, _ = torch.cuda.mem_get_info()
        taken = torch.empty(free - (64 << 20), dtype=torch.uint8, device="cuda")
        with pytest.raises(NotEnoughMemory, match="snapshot='host'"):
            run.save(1, state)
        optimizer.step()
        del taken
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run.save(1, state).result(60)
