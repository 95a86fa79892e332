"""Frozen tensors that several ranks hold parts of are written once: afterwards their files are linked, unless one of
the ranks has changed its part."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from conftest import unseen_by_crc32c
from support.fault_points import BOUND_SECONDS, checkpointer
from support.harness import Crew, Crews, Fault, Me
from support.lora import BASE_BYTES, local_part, lora, opened, save, shared_base, spoil, stored, train

import asyncckpt
from asyncckpt import SaveFailed
from asyncckpt.ranks.store import RankStore
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.shard_file import LocalShardWriter

# -- nothing has changed ---------------------------------------------------------------------------------------------


def _saves(me: Me, path: str, way: str, options: dict[str, Any], first: int = 1) -> dict[str, Any]:
    state = lora(me, way)
    written, wrong = [], []
    with opened(path, **options) as run:
        if first > 1:
            run.resume(state)
        for step in range(first, first + 3):
            train(state, step)
            written.append(save(run, step, state))
            wrong += stored(me, run, step, state)
    return {"written": written, "wrong": wrong}


@pytest.mark.parametrize(
    ("way", "size", "options"),
    [("fsdp2", 3, {}), ("tp", 2, {}), ("fsdp2", 2, {"digest": "crc32c", "keep": asyncckpt.KeepLast(1)})],
    ids=["fsdp2", "tp", "fsdp2-crc32c-kept-once"],
)
def test_a_sharded_frozen_base_is_written_once(
    way: str, size: int, options: dict[str, Any], crews: Crews, tmp_path: Path
) -> None:
    path = str(tmp_path / "run")
    found = crews(size).values(_saves, path, way, options)
    assert [one["wrong"] for one in found] == [[]] * size
    first, *later = (sum(one["written"][at] for one in found) for at in range(3))
    assert first > BASE_BYTES
    assert max(later) < first - BASE_BYTES + 4096, "bytes of the base are written again"
    if "keep" not in options:
        assert shared_base(path, 1, 2)
        assert shared_base(path, 2, 3)


@pytest.mark.parametrize(
    "options",
    [{"format": "zarr"}, {"format": "zarr", "codec": "planes"}, {"codec": "planes"}, {"per_rank": True}],
    ids=["zarr", "zarr-planes", "planes", "per-rank"],
)
def test_so_are_files_that_one_rank_each_writes(options: dict[str, Any], crews: Crews, tmp_path: Path) -> None:
    found = crews(2).values(_saves, str(tmp_path / "run"), "fsdp2", options)
    assert [one["wrong"] for one in found] == [[], []]
    first, *later = (sum(one["written"][at] for one in found) for at in range(3))
    assert max(later) < first - 0.7 * BASE_BYTES  # which planes make smaller


def test_a_job_that_goes_on_links_what_the_one_before_it_wrote(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    crews(3).values(_saves, path, "fsdp2", {})
    found = crews(3).values(_saves, path, "fsdp2", {}, 4)
    assert [one["wrong"] for one in found] == [[]] * 3
    assert shared_base(path, 3, 4)
    assert shared_base(path, 4, 6)


def test_other_ranks_write_the_base_anew_once(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    crews(3).values(_saves, path, "fsdp2", {})
    found = crews(2).values(_saves, path, "fsdp2", {}, 4)
    assert [one["wrong"] for one in found] == [[]] * 2
    assert not shared_base(path, 3, 4), "they hold other parts of it"
    assert shared_base(path, 4, 5)


# -- one rank has changed its part -----------------------------------------------------------------------------------


def _changed(me: Me, path: str, who: int, options: dict[str, Any]) -> dict[str, Any]:
    """One rank changes a value of the base before step 3, and none does before step 4."""
    state = lora(me)
    wrong: list[str] = []
    written = []
    with opened(path, **options) as run:
        for step in range(1, 5):
            train(state, step)
            if step == 3 and me.rank == who:
                spoil(state)
            written.append(save(run, step, state))
            wrong += stored(me, run, step, state)
    return {"wrong": wrong, "written": written}


@pytest.mark.parametrize("digest", ["xxh3-128", "crc32c"])
@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_base_that_one_rank_has_changed_is_written_anew(who: int, digest: str, crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    found = crews(3).values(_changed, path, who, {"digest": digest})
    assert [one["wrong"] for one in found] == [[]] * 3
    assert shared_base(path, 1, 2)
    assert not shared_base(path, 2, 3)
    assert shared_base(path, 3, 4)
    assert sum(one["written"][2] for one in found) == sum(one["written"][0] for one in found), "all of it, once"


def _learned_late(me: Me, path: str, digest: str) -> list[str]:
    """Rank 1 still takes step 1 for the newest when it saves step 3, where its part is what it was at step 1. With
    crc32c, step 2 has the same digests."""
    state = lora(me)
    wrong: list[str] = []
    part = local_part(state["model"].base.weight.detach())
    value = float(part[0, 3])
    with opened(path, digest=digest) as run:
        for step in (1, 2, 3):
            if me.rank == 1 and step > 1 and digest == "crc32c":
                unseen_by_crc32c(part)
            elif me.rank == 1 and step > 1:
                spoil(state, 7.0 if step == 2 else value)
            learn = run._reuse.learn
            if me.rank == 1 and step == 2:
                run._reuse.learn = lambda *_: None  # type: ignore[method-assign]
            save(run, step, state)
            run._reuse.learn = learn  # type: ignore[method-assign]
            wrong += stored(me, run, step, state)
    return wrong


@pytest.mark.parametrize("digest", ["xxh3-128", "crc32c"])
def test_ranks_that_compare_with_different_checkpoints_link_nothing_that_differs(
    digest: str, crews: Crews, tmp_path: Path
) -> None:
    assert crews(2).values(_learned_late, str(tmp_path / "run"), digest) == [[], []]
    assert not shared_base(str(tmp_path / "run"), 2, 3)


def _flipped(me: Me, path: str) -> list[str]:
    """A bit of the base flips on the disk; the parts are read back in turn, here all at every save."""
    state = lora(me)
    with opened(path) as run:
        save(run, 1, state)
        save(run, 2, state)
        dist.barrier()
        if me.rank == 0:
            with Path(path, "step-00000002", "model-00001-of-00002.safetensors").open("r+b") as file:
                file.seek(BASE_BYTES - 20_000)  # the last rank's
                byte = file.read(1)
                file.seek(-1, 1)
                file.write(bytes([byte[0] ^ 4]))
        dist.barrier()
        save(run, 3, state)
        if me.rank == 0:
            assert "step-00000002" in run._quarantine, "rank 0 applies retention, and counts it"
            assert "step-00000003" not in run._quarantine
        return stored(me, run, 3, state)


def test_a_part_that_is_damaged_since_is_found_by_its_rank_and_the_file_written_anew(
    crews: Crews, tmp_path: Path
) -> None:
    assert crews(3).values(_flipped, str(tmp_path / "run")) == [[]] * 3
    assert not shared_base(str(tmp_path / "run"), 2, 3)


# -- what it costs, and where the file system cannot link ------------------------------------------------------------


class _Messages:
    """Counts the messages that this rank leaves and reads, while it is in effect."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("post", "read"):
            patch.setattr(RankStore, name, self._counting(getattr(RankStore, name)))

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(ranks: RankStore, *args: Any) -> Any:
            self.count += 1
            return real(ranks, *args)

        return call


def _counted(me: Me, path: str, links: bool, changes: int) -> list[int]:
    """How many messages this rank leaves and reads at each save; from step 3 on, of files that it has not changed."""
    state = lora(me)
    found: list[int] = []
    with opened(path) as run, pytest.MonkeyPatch.context() as patch:
        run._store.links = links or me.rank != 0  # type: ignore[union-attr]  # rank 0 alone tries, and finds it out
        for step in range(1, 6):
            train(state, step)
            if step == changes and me.rank == 1:
                spoil(state)
            dist.barrier()
            with patch.context() as inner:
                messages = _Messages(inner)
                save(run, step, state)
                found.append(messages.count)
            assert stored(me, run, step, state) == []
    return found[1:]  # the first has planned


@pytest.mark.parametrize(
    ("links", "changes", "ranks"),
    [(True, 0, ([1, 1, 1, 1], [2, 2, 2, 2])), (True, 4, ([1, 1, 2, 1], [2, 2, 3, 2])), (False, 0, None)],
    ids=["unchanged", "changed", "no-links"],
)
def test_a_second_round_takes_place_only_where_ranks_differ(
    links: bool, changes: int, ranks: tuple[list[int], list[int]] | None, crews: Crews, tmp_path: Path
) -> None:
    found = crews(3).values(_counted, str(tmp_path / "run"), links, changes)
    if ranks is not None:
        assert (found[0], found[1]) == ranks
        assert found[2] == [2, 2, 4, 2] if changes else found[2] == ranks[1]
    else:
        assert found[1] == [4, 2, 2, 2], "a rank that has heard that nothing can be linked compares no more"


def _with_little_room(me: Me, path: str) -> list[str]:
    """How saves end where there is room for what is trained alone from step 2 on. Rank 1 changes the base before
    step 3, and before step 4 it turns out that nothing can be linked."""
    state = lora(me)
    found: list[str] = []
    with opened(path) as run:
        save(run, 1, state)
        run._store.free_bytes = lambda: (4 << 20) + BASE_BYTES // 2  # type: ignore[union-attr]
        for step in (2, 3, 4):
            train(state, step)
            if step == 3 and me.rank == 1:
                spoil(state)
            if step == 4 and me.rank == 0:
                run._store.links = False  # type: ignore[union-attr]
                run._store.ops.link = _refuse  # type: ignore[union-attr]
            error = run.save(step, state).exception(60)
            run.wait()
            dist.barrier()
            found.append(type(error).__name__)
    return found


def _refuse(*_: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_the_disk_needs_no_room_for_what_is_linked(crews: Crews, tmp_path: Path) -> None:
    found = crews(2).values(_with_little_room, str(tmp_path / "run"))
    assert found == [["NoneType", "NoneType", "NotEnoughSpace"]] * 2, "rank 1 had the blocks at step 3"


def test_a_file_that_has_another_name_is_not_written_to_by_several_ranks(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    (tmp_path / "old").write_bytes(b"good")
    os.link(tmp_path / "old", tmp_path / "new")
    with pytest.raises(SaveFailed, match="another checkpoint"):
        LocalShardWriter(store, str(tmp_path / "new"), 4, shared=True)
    assert (tmp_path / "old").read_bytes() == b"good"


# -- ranks that are lost on the way ----------------------------------------------------------------------------------


def _struck(me: Me, path: str, who: int) -> dict[str, Any]:
    """Save a base, and again with the part of rank ``who`` changed (-1: none). Points are ``told``, once a rank has
    reported the second save, ``asked``, once it has heard that it is to write, and ``asking``, once rank 0 has said
    so."""
    run, ops = checkpointer(me, path)
    run._store.reflinks = False  # type: ignore[union-attr]
    state = lora(me)
    save(run, 1, state)
    dist.barrier()
    assert run._coordinator is not None
    ranks = run._coordinator.ranks
    post, read = ranks.post, ranks.read

    def posting(key: str, body: Any) -> None:
        post(key, body)
        if key == f"save/1/{me.rank}":
            me.at("told")
        elif isinstance(body, dict) and "write" in body:
            me.at("asking")

    def reading(*args: Any) -> Any:
        body = read(*args)
        if isinstance(body, dict) and "write" in body:
            me.at("asked")
            ops.armed = True
        return body

    ranks.post, ranks.read = posting, reading  # type: ignore[method-assign]
    if me.rank == who:
        spoil(state)
    train(state, 2)
    error = run.save(2, state).exception(60)
    ops.armed = False
    return {"error": type(error).__name__ if error is not None else "", "message": str(error)}


def _resumed(me: Me, path: str) -> int:
    state = lora(me)
    run, _ = checkpointer(me, path)
    with run:
        step = run.resume(state)
        save(run, 9, state)
        assert stored(me, run, 9, state) == []
        return step


def _lost(crews: Crews, path: Path, who: int, fault: Fault) -> list[Any]:
    """What the others say; then a run of as many ranks goes on."""
    crews.leave_room(3)
    with Crew(3) as crew:
        outcomes = crew.run(_struck, str(path), who, fault=fault, timeout=60 + BOUND_SECONDS)
        if fault.how == "stop":
            crew.wait_stopped(fault.rank)
    assert fault.how != "kill" or outcomes[fault.rank].gone, "it was not struck at all"
    others = [one for one in outcomes if fault.error is not None or one.rank != fault.rank]
    for one in others:
        assert one.ok, f"rank {one.rank}: {one.trace or 'no answer'}"
    return [one.value for one in others]


def test_a_rank_that_is_lost_once_it_has_reported_is_not_needed(crews: Crews, tmp_path: Path) -> None:
    path = tmp_path / "run"
    for one in _lost(crews, path, -1, Fault(1, "told")):
        assert one["error"] == "", one
    assert shared_base(str(path), 1, 2)
    assert set(crews(3).values(_resumed, str(path))) == {2}


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAULTS: Mapping[str, tuple[Fault, str]] = {
    "killed": (Fault(1, "asked"), "RankLost"),
    "stopped": (Fault(1, "asked", "stop"), "RankLost"),
    "killed-while-it-writes": (Fault(1, "write"), "RankLost"),
    "no-space": (Fault(1, "write", "raise", error=FULL), "NotEnoughSpace"),
    "not-reported": (Fault(1, "report"), "RankLost"),
    "rank-0-killed": (Fault(0, "asking"), "RankLost"),
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=[] if fault in ("killed-while-it-writes", "no-space") else [pytest.mark.slow])
        for fault in FAULTS
    ],
)
def test_of_a_rank_that_does_not_write_what_it_is_asked_for_all_learn(fault: str, crews: Crews, tmp_path: Path) -> None:
    struck, error = FAULTS[fault]
    for one in _lost(crews, tmp_path / "run", 2, struck):
        assert one["error"] == error, one
        assert "rank" in one["message"] or one["error"] == "NotEnoughSpace", one
    assert set(crews(3).values(_resumed, str(tmp_path / "run"))) == {1}
