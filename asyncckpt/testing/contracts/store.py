"""These tests say what every storage backend has to do; a subclass runs them with pytest alone."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from asyncckpt.errors import AsyncCkptError, CheckpointDamaged, CheckpointNotFound, LeaseLost, RunLocked, StepExists
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.protocols import Capability, FileInfo, PendingDirectory, Reader, ShardWriter, Store, renaming
from asyncckpt.types import MANIFEST_FILE, LeaseOptions

#: A step and names as the library gives them.
_STEP = 7
_NAME = "step-00000007"


class StoreContract:
    """What ``protocols.Store`` promises. A subclass makes stores of one run, which is empty at first."""

    def store(self) -> Store:
        """A store of the run that is tested: another object at every call, as another process would have."""
        raise NotImplementedError("a subclass returns a store here")

    @pytest.fixture
    def opened(self) -> Store:
        """The run, ready to be written."""
        store = self.store()
        store.prepare(create_parents=True)
        return store

    # -- whole checkpoints -------------------------------------------------------------------------------------------

    def test_a_published_checkpoint_has_every_byte(self, opened: Store) -> None:
        directory = opened.begin(_STEP, _uuid(1), name=_NAME)
        files = {"a.safetensors": _bytes(3 * 4096 + 5), "deep/er/c": _bytes(17), "empty": b""}
        for file, data in files.items():
            _write(directory, file, data)
        directory.write_small({"state.json": b"{}", "deep/zarr.json": b"[1]"})
        _finish(directory)
        with contextlib.closing(self.store().open(_NAME)) as reader:
            sizes = {file: len(data) for file, data in files.items()}
            beside = {"state.json": 2, "deep/zarr.json": 3, MANIFEST_FILE: len(_MANIFEST)}
            assert reader.files() == {**sizes, **beside}
            for file, data in files.items():
                assert _read(reader, file, len(data), 0) == data
            assert reader.read_small(MANIFEST_FILE, 1 << 20) == _MANIFEST

    def test_a_range_is_read_and_no_more(self, opened: Store) -> None:
        data = _bytes(5 * 4096)
        self._publish(opened, {"a": data})
        with contextlib.closing(opened.open(_NAME)) as reader:
            for offset, nbytes in ((0, 4096), (4096, 8192), (4 * 4096, 4096)):
                assert _read(reader, "a", nbytes, offset) == data[offset : offset + nbytes]
            assert _read(reader, "a", 2 * 4096, 4 * 4096) == data[4 * 4096 :], "the end of the file ends the read"

    def test_extents_come_in_any_order_from_several_threads(self, opened: Store) -> None:
        data = _bytes(32 * 4096 + 100)
        directory = opened.begin(_STEP, _uuid(1), name=_NAME)
        writer = directory.create_shard("a", len(data))
        offsets = [*range(0, len(data), 4096)]
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda offset: _write_at(writer, data, offset, 4096), reversed(offsets)))
        writer.finish(len(data))
        _finish(directory)
        with contextlib.closing(opened.open(_NAME)) as reader:
            assert _read(reader, "a", len(data), 0) == data

    def test_a_file_is_cut_to_the_size_it_is_finished_with(self, opened: Store) -> None:
        data = _bytes(4096)
        directory = opened.begin(_STEP, _uuid(1), name=_NAME)
        writer = directory.create_shard("a", 1 << 20)
        _write_at(writer, data, 0, 4096)
        writer.finish(1000)
        _finish(directory)
        with contextlib.closing(opened.open(_NAME)) as reader:
            assert reader.files()["a"] == reader.files_nbytes("a") == 1000

    def test_nothing_is_visible_before_it_is_published(self, opened: Store) -> None:
        directory = opened.begin(_STEP, _uuid(1), name=_NAME)
        _write(directory, "model-00001-of-00001.safetensors", _bytes(4096))
        directory.write_small({"state.json": b"{}", MANIFEST_FILE: _MANIFEST})
        directory.sync_directory()
        assert self.store().names() == []
        with contextlib.closing(directory.open()) as reader:
            assert _read(reader, "model-00001-of-00001.safetensors", 4096, 0) == _bytes(4096)
            assert reader.read_small(MANIFEST_FILE, 1 << 20) == _MANIFEST
        directory.publish(_NAME, replace=False)
        assert self.store().names() == [_NAME]

    def test_a_name_that_is_taken_is_refused_and_left_as_it_is(self, opened: Store) -> None:
        self._publish(opened, {"a": b"first"})
        with pytest.raises(StepExists):
            self._publish(opened, {"a": b"later"}, number=2)
        with contextlib.closing(opened.open(_NAME)) as reader:
            assert _read(reader, "a", 5, 0) == b"first"

    def test_an_attempt_is_never_begun_twice(self, opened: Store) -> None:
        opened.begin(_STEP, _uuid(1), name=_NAME)
        with pytest.raises(OSError, match="exist"):
            opened.begin(_STEP, _uuid(1), name=_NAME)

    def test_ranks_write_their_own_files_of_one_attempt(self, opened: Store) -> None:
        other = self.store()
        first = opened.begin(_STEP, _uuid(1), name=_NAME, shared=True)
        second = other.begin(_STEP, _uuid(1), name=_NAME, shared=True)
        _write(first, "a", b"of rank 0")
        _write(second, "b", b"of rank 1")
        second.sync_directory()
        second.close()
        _finish(first)
        with contextlib.closing(self.store().open(_NAME)) as reader:
            assert (_read(reader, "a", 9, 0), _read(reader, "b", 9, 0)) == (b"of rank 0", b"of rank 1")

    def test_what_was_discarded_is_gone_and_its_name_is_free(self, opened: Store) -> None:
        directory = opened.begin(_STEP, _uuid(1), name=_NAME)
        _write(directory, "a", _bytes(4096))
        directory.create_shard("half", 4096)
        directory.discard()
        directory.discard()
        assert opened.names() == []
        assert opened.reclaim() == []
        self._publish(opened, {"a": b"again"}, number=2)

    def test_a_published_checkpoint_outlives_being_discarded_and_closed(self, opened: Store) -> None:
        directory = self._publish(opened, {"a": b"all of it"})
        directory.close()
        directory.discard()
        with contextlib.closing(opened.open(_NAME)) as reader:
            assert _read(reader, "a", 9, 0) == b"all of it"

    def test_a_file_given_up_takes_no_more_bytes(self, opened: Store) -> None:
        directory = opened.begin(_STEP, _uuid(1), name=_NAME)
        writer = directory.create_shard("a", 8192)
        writer.abort()
        writer.abort()
        with pytest.raises((AsyncCkptError, OSError)):
            _write_at(writer, _bytes(4096), 0, 4096)

    # -- finding and deleting ----------------------------------------------------------------------------------------

    def test_what_is_not_there_says_so(self, opened: Store) -> None:
        with pytest.raises(CheckpointNotFound):
            opened.open(_NAME)
        assert opened.identity(_NAME) is None
        assert opened.listing(_NAME) == {}
        with pytest.raises(FileNotFoundError):
            opened.remove(_NAME)
        opened.delete(".pins/nothing")

    def test_a_missing_file_is_damage(self, opened: Store) -> None:
        self._publish(opened, {"a": b"1"})
        with contextlib.closing(opened.open(_NAME)) as reader:
            with pytest.raises(CheckpointDamaged, match="missing"):
                reader.files_nbytes("b")
            with pytest.raises(CheckpointDamaged, match="missing"):
                reader.read_small("b", 100)

    def test_a_small_file_larger_than_the_limit_is_damage(self, opened: Store) -> None:
        self._publish(opened, {"a": _bytes(4097)})
        with contextlib.closing(opened.open(_NAME)) as reader, pytest.raises(CheckpointDamaged, match="limit"):
            reader.read_small("a", 4096)

    def test_a_listing_says_what_is_what(self, opened: Store) -> None:
        self._publish(opened, {"a": _bytes(10), "c/d": b"1"})
        found = opened.listing(_NAME)
        assert found["a"] == FileInfo(10, "file")
        assert found["c"] == FileInfo(0, "folder")
        assert opened.listing("")[_NAME] == FileInfo(0, "folder")

    def test_a_removed_checkpoint_is_gone_and_another_is_another(self, opened: Store) -> None:
        self._publish(opened, {"a": b"1", "deep/b": b"2"})
        before = opened.identity(_NAME)
        assert before is not None
        assert self.store().identity(_NAME) == before
        assert opened.remove(_NAME)
        assert (opened.identity(_NAME), opened.names(), opened.listing(_NAME)) == (None, [], {})
        self._publish(opened, {"a": b"2"}, number=2)
        assert opened.names() == [_NAME]
        with contextlib.closing(opened.open(_NAME)) as reader:
            assert sorted(reader.files()) == ["a", MANIFEST_FILE]

    def test_leftovers_of_the_dead_are_reclaimed_and_nothing_else(self, opened: Store) -> None:
        self._publish(opened, {"a": b"1"})
        opened.put(".pins/" + _NAME, b"")
        opened.put("latest", b"x", replace=True)
        dead = self.store().begin(8, _uuid(2), name="step-00000008")
        _write(dead, "a", _bytes(4096))
        fresh = self.store()
        assert len(fresh.reclaim()) == 1
        assert fresh.names() == [_NAME]
        assert _NAME in fresh.listing(".pins")
        assert fresh.identity("latest") is not None
        assert fresh.reclaim() == []
        self._publish(fresh, {"a": b"2"}, number=3, name="step-00000008")

    # -- small objects -----------------------------------------------------------------------------------------------

    def test_a_small_object_is_created_once(self, opened: Store) -> None:
        def create(_: int) -> bool:
            try:
                self.store().put(".pins/one", b"mine")
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(create, range(16))) == 1
        assert list(opened.listing(".pins")) == ["one"]
        opened.delete(".pins/one")
        assert not opened.listing(".pins")
        assert create(0)

    def test_a_hint_is_replaced(self, opened: Store) -> None:
        opened.put("latest", b"one\n", replace=True)
        first = opened.listing("")["latest"]
        opened.put("latest", b"another\n", replace=True)
        assert (first.nbytes, opened.listing("")["latest"].nbytes) == (4, 8)
        assert opened.names() == []

    # -- one writer --------------------------------------------------------------------------------------------------

    def test_a_run_has_one_writer(self, opened: Store) -> None:
        held = opened.hold(options=_FAST)
        recorded = opened.holder()
        assert recorded is not None
        assert recorded.owner == held.owner
        with pytest.raises(RunLocked):
            self.store().hold(options=_FAST)
        held.check()
        held.release()
        held.release()
        following = self.store().hold(options=_FAST)
        assert following.owner != held.owner
        following.release()

    def test_who_was_cut_off_learns_it(self, opened: Store) -> None:
        old = opened.hold(options=_FAST)
        new = self.store().hold(takeover=True, options=_FAST)
        with pytest.raises(LeaseLost):
            old.check()
        old.release()
        new.check()
        with pytest.raises(RunLocked):
            self.store().hold(options=_FAST)
        new.release()

    # -- what only some can ------------------------------------------------------------------------------------------

    def test_a_checkpoint_is_replaced_where_names_move(self, opened: Store) -> None:
        self._publish(opened, {"a": b"first"})
        if Capability.RENAMES not in opened.capabilities:
            with pytest.raises(StepExists):
                opened.begin(_STEP, _uuid(2), name=_NAME)
            return
        self._publish(opened, {"a": b"later"}, number=2, replace=True)
        with contextlib.closing(opened.open(_NAME)) as reader:
            assert _read(reader, "a", 5, 0) == b"later"

    def test_a_checkpoint_makes_way_and_gets_its_name_back(self, opened: Store) -> None:
        store = renaming(opened)
        if store is None:
            pytest.skip("names do not move here")
        self._publish(store, {"a": b"first"})
        hidden = store.make_way(_NAME, _uuid(2))
        assert hidden is not None
        assert store.make_way(_NAME, _uuid(3)) is None
        assert (store.names(), store.replaced()) == ([], [hidden])
        assert store.reclaim() == []
        assert store.put_back(hidden)
        assert (store.names(), store.replaced()) == ([_NAME], [])
        aside = store.set_aside(_NAME)
        assert store.names() == []
        assert aside in store.listing("")
        assert store.reclaim() == []

    def test_a_file_is_taken_over_where_there_are_links(self, opened: Store) -> None:
        data = _bytes(4096)
        self._publish(opened, {"a": data})
        directory = opened.begin(8, _uuid(2), name="step-00000008")
        with contextlib.closing(opened.open(_NAME)) as reader:
            linked = directory.link(reader, "a", 4096, "b")
            assert linked == (Capability.LINKS in opened.capabilities)
            with pytest.raises(CheckpointDamaged):
                directory.link(reader, "a", 4095, "c")
        if linked:
            _finish(directory, "step-00000008")
            opened.remove(_NAME)
            with contextlib.closing(opened.open("step-00000008")) as reader:
                assert _read(reader, "b", 4096, 0) == data

    def test_ranks_write_into_one_file_where_files_can_be_shared(self, opened: Store) -> None:
        first = opened.begin(_STEP, _uuid(1), name=_NAME, shared=True)
        if Capability.SHARED_FILES not in opened.capabilities:
            with pytest.raises(AsyncCkptError):
                first.create_shard("a", 8192, shared=True)
            return
        second = self.store().begin(_STEP, _uuid(1), name=_NAME, shared=True)
        data = _bytes(8192)
        writers = [directory.create_shard("a", 8192, shared=True) for directory in (first, second)]
        _write_at(writers[1], data, 4096, 4096)
        _write_at(writers[0], data, 0, 4096)
        for writer in writers:
            writer.finish(8192)
        second.close()
        _finish(first)
        with contextlib.closing(opened.open(_NAME)) as reader:
            assert _read(reader, "a", 8192, 0) == data

    def test_a_reader_keeps_a_checkpoint_where_there_are_locks(self, opened: Store) -> None:
        self._publish(opened, {"a": b"1"})
        with contextlib.closing(self.store().open(_NAME)):
            assert opened.remove(_NAME) == (Capability.LOCKS not in opened.capabilities)
        if Capability.LOCKS in opened.capabilities:
            assert opened.remove(_NAME)

    # ----------------------------------------------------------------------------------------------------------------

    def _publish(
        self, store: Store, files: Mapping[str, bytes], *, number: int = 1, name: str = _NAME, replace: bool = False
    ) -> PendingDirectory:
        directory = store.begin(_STEP, _uuid(number), name=name)
        for file, data in files.items():
            _write(directory, file, data)
        _finish(directory, name, replace=replace)
        return directory


_MANIFEST = b'{"format": "a manifest, to a store"}'
_FAST = LeaseOptions(beat_seconds=0.05, ttl_seconds=0.5)


def _uuid(number: int) -> str:
    return f"{number:032x}"


def _bytes(nbytes: int) -> bytes:
    return np.random.default_rng(nbytes).bytes(nbytes)


def _write_at(writer: ShardWriter, data: bytes, offset: int, nbytes: int) -> None:
    """Write a part of the data from memory that is aligned and padded as extents are."""
    part = data[offset : offset + nbytes]
    room = memoryview(aligned_buffer(max(len(part), 1)))
    room[: len(part)] = part
    writer.write_at(room, len(part), offset)


def _write(directory: PendingDirectory, file: str, data: bytes) -> None:
    writer = directory.create_shard(file, len(data))
    if data:
        _write_at(writer, data, 0, len(data))
    writer.finish(len(data))


def _finish(directory: PendingDirectory, name: str = _NAME, *, replace: bool = False) -> None:
    directory.sync_directory()
    directory.write_small({MANIFEST_FILE: _MANIFEST})
    directory.sync_directory()
    directory.publish(name, replace=replace)


def _read(reader: Reader, file: str, nbytes: int, offset: int) -> bytes:
    room = memoryview(aligned_buffer(max(nbytes, 1)))
    return bytes(room[: reader.read_into(file, room, nbytes, offset)])
