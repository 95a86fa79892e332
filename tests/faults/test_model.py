"""Every crash state of small runs: nothing acknowledged is lost, nothing torn is visible."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.model_scenarios import SCENARIOS, Scenario, killed_anywhere

from asyncckpt.testing import CrashModel, Outcome, RecordingOps, check_trace, permitted

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def check(scenario: Scenario, root: Path) -> Outcome:
    recovery = scenario.recovery(scenario.record(root).trace())
    return check_trace(recovery)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_no_power_loss_breaks_a_promise(scenario: Scenario, tmp_path: Path) -> None:
    outcome = check(scenario, tmp_path)
    assert outcome.violations == []
    assert not outcome.sampled, "not every state was walked"
    assert outcome.states > 800, f"hardly anything was checked: {outcome}"


@pytest.mark.parametrize("after", range(1, 60, 6))
def test_no_kill_and_later_power_loss_breaks_a_promise(after: int, tmp_path: Path) -> None:
    steps = {1: 1, 2: 1, 3: 1}
    outcome = check(Scenario(f"killed after {after}", killed_anywhere(after), steps), tmp_path)
    assert outcome.violations == []
    assert outcome.states > 800


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("writers", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["one save", "two saves, retention"])
def test_no_power_loss_at_any_order_of_the_writers_operations_breaks_a_promise(
    name: str, writers: int, tmp_path: Path
) -> None:
    """A file for each writer; their operations in every order that the threads' waiting for each other permits."""
    scenario = replace(BY_NAME[name], threads=writers, shards=writers)
    outcome = check_trace(scenario.recovery(scenario.permitted(tmp_path)))
    print(f"{name}, {writers} writers: {outcome}")
    assert outcome.violations == []
    assert not outcome.sampled, "not every state was walked"


# -- bugs that the model found -----------------------------------------------------------------------------------------


def test_a_checkpoint_being_deleted_is_not_half_visible_after_a_power_loss(tmp_path: Path) -> None:
    ops = BY_NAME["two saves, retention"].record(tmp_path)
    kinds = [event.kind for event in ops.events]
    gone = next(n for n, event in enumerate(ops.events) if os.path.basename(event.target).startswith(".trash-"))
    assert kinds[gone + 1] == "fsync_directory", "the files went before the rename was durable"


def test_parents_that_were_made_are_durable_before_the_first_acknowledgement(tmp_path: Path) -> None:
    outcome = check(BY_NAME["parents made"], tmp_path)
    assert outcome.violations == []


def test_retention_never_counts_on_a_checkpoint_that_a_killed_run_left_undurable(tmp_path: Path) -> None:
    outcome = check(BY_NAME["killed after the rename, then pruned"], tmp_path)
    assert outcome.violations == []


def test_a_run_directory_that_a_killed_process_made_is_made_durable_by_the_next(tmp_path: Path) -> None:
    outcome = check(BY_NAME["killed when the run was made"], tmp_path)
    assert outcome.violations == []


# -- the model itself --------------------------------------------------------------------------------------------------


def trees(root: Path, program: Callable[[RecordingOps, str], None], **options: bool) -> list[dict[str, bytes | None]]:
    """The crash states after the whole of a program, as path: bytes."""
    ops = RecordingOps(str(root))
    program(ops, str(root))
    model = CrashModel(ops.trace(), **options)
    everything = (1 << len(model.trace.events)) - 1
    return [dict(model.items(tree)) for _, tree in model.states(everything)]


def written(ops: RecordingOps, root: str, *, sync: bool, sync_names: bool) -> None:
    fd = ops.open(f"{root}/file", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    ops.pwrite(fd, b"n" * 8192, 0)
    if sync:
        ops.fsync(fd)
    ops.close(fd)
    if sync_names:
        ops.fsync_directory(root)


def test_an_unsynced_write_is_lost_kept_or_torn_and_the_size_is_no_evidence(tmp_path: Path) -> None:
    found = trees(tmp_path, lambda ops, root: written(ops, root, sync=False, sync_names=True))
    new, hole = b"n" * 4096, bytes(4096)
    contents = {tree["file"] for tree in found}
    assert {b"", new + new, new + hole, hole + new, hole + hole} <= contents
    assert any(b"\xa5" in content for content in contents if content), "never garbage in a block that was not written"


def test_a_synced_file_without_its_directory_may_be_gone_and_is_whole_where_it_is_not(tmp_path: Path) -> None:
    found = trees(tmp_path, lambda ops, root: written(ops, root, sync=True, sync_names=False))
    assert sorted(found, key=len) == [{}, {"file": b"n" * 8192}]


def test_a_synced_file_in_a_synced_directory_is_there(tmp_path: Path) -> None:
    found = trees(tmp_path, lambda ops, root: written(ops, root, sync=True, sync_names=True))
    assert found == [{"file": b"n" * 8192}]


def test_names_of_a_directory_are_reordered_and_a_rename_is_atomic(tmp_path: Path) -> None:
    def program(ops: RecordingOps, root: str) -> None:
        ops.mkdir(f"{root}/a")
        ops.fsync_directory(root)
        ops.rename_noreplace(f"{root}/a", f"{root}/b")
        ops.mkdir(f"{root}/c")

    names = {tuple(tree) for tree in trees(tmp_path, program)}
    assert names == {("a",), ("b",), ("a", "c"), ("b", "c")}


def test_an_unlink_may_be_durable_before_the_rename_of_its_directory(tmp_path: Path) -> None:
    def program(ops: RecordingOps, root: str) -> None:
        ops.mkdir(f"{root}/a")
        fd = ops.open(f"{root}/a/file", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        ops.close(fd)
        ops.fsync_directory(f"{root}/a")
        ops.fsync_directory(root)
        ops.rename_noreplace(f"{root}/a", f"{root}/b")
        ops.unlink(f"{root}/b/file")

    assert ("a",) in {tuple(tree) for tree in trees(tmp_path, program)}


def test_file_systems_that_sync_a_files_name_with_it_are_within_the_model(tmp_path: Path) -> None:
    scenario = BY_NAME["two saves, retention"]
    trace = scenario.record(tmp_path).trace()
    strict, lax = CrashModel(trace), CrashModel(trace, names_with_files=True)

    def found(model: CrashModel, cut: int) -> set[tuple[tuple[str, bytes | None], ...]]:
        return {tuple(model.items(tree)) for _, tree in model.states(cut)}

    fewer = 0
    for cut in trace.cuts():
        assert found(lax, cut) <= found(strict, cut)
        fewer += found(lax, cut) < found(strict, cut)
    assert fewer, "the two variants are one"
    assert check_trace(scenario.recovery(trace, names_with_files=True)).violations == []


def test_states_counted_as_one_are_as_many_as_walking_each_gives(tmp_path: Path) -> None:
    scenario = BY_NAME["one save"]
    trace = scenario.record(tmp_path).trace()
    model, bare = CrashModel(trace), CrashModel(trace, hide=())
    for cut in trace.cuts():
        merged = list(model.states(cut))
        each = list(bare.states(cut))
        assert sum(count for count, _ in merged) == sum(count for count, _ in each)
        seen = {tuple(item for item in model.items(tree) if "/.tmp-" not in item[0]) for _, tree in merged}
        assert seen == {tuple(item for item in bare.items(tree) if "/.tmp-" not in item[0]) for _, tree in each}


def test_events_that_do_not_commute_are_refused(tmp_path: Path) -> None:
    ops = RecordingOps(str(tmp_path))
    ops.mkdir(str(tmp_path / "a"))
    ops.rmdir(str(tmp_path / "a"))
    trace = ops.trace()
    trace.before[1] = 0
    with pytest.raises(AssertionError, match="either order"):
        CrashModel(trace)


def test_the_permitted_orders_are_those_that_the_program_guarantees(tmp_path: Path) -> None:
    rounds = iter(range(100))

    def fresh() -> RecordingOps:
        root = tmp_path / str(next(rounds))
        root.mkdir()
        return RecordingOps(str(root))

    def program(ops: RecordingOps) -> None:
        def make(name: str) -> None:
            ops.mkdir(f"{ops.root}/{name}")
            ops.fsync_directory(f"{ops.root}/{name}")

        threads = [threading.Thread(target=make, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ops.mkdir(f"{ops.root}/last")

    trace = permitted(program, fresh, 0.05)
    assert len(list(trace.cuts())) == 3 * 3 + 1, "two chains of two events, in any order, and then one"
