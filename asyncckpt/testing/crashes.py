"""``CrashModel`` lists the directory trees that a power loss may leave, given what a store had asked of the file system
until then.

The model is deliberately more forgetful than any one file system:

- *When.* The power goes at any moment of any run that the trace permits: after any set of events that is closed under
  "comes before" (``Trace.cuts``).
- *File data.* What a completed ``fsync`` of the file covers (what ended before it began) is durable. Each 4 KiB block
  of each later write is there or not, independently of all others: lost, kept, torn, in any order; a block that was
  never durable may also hold garbage. The size may be any size the file had since.
- *Names.* What a completed ``fsync_directory`` covers is durable. Of the later changes of a directory any subset is
  there, in any order, as long as the changes of one name are in order. A rename or an exchange within a directory is
  atomic. Names and the data they lead to are independent: a rename may be durable before the data, an unlink
  inside a directory before the directory's own rename.
- ``fsync`` of a file does not make its name durable. ``names_with_files=True`` is the file system where it does (ext4
  and others), parents included: its trees are among those of the strict model.
- ``reserve`` may change the size; it proves nothing about data. A link shares the file; the data may be torn later.

A crash state is a cut, and a choice for every directory and file that is not fully durable. States that differ only in
what recovery cannot reach (the inside of hidden directories, files whose names were lost) give it the same tree: they
are walked as one and counted with their number.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from asyncckpt.testing.recording import Event, Trace

BLOCK_BYTES = 4096
#: A file with more choices than this is walked through the plainest alone: each block lost by itself, or kept by
#: itself, and all.
_MOST_CHOICES = 1 << 14

Tree = tuple[tuple[str, int], ...]
Names = Mapping[str, int | None]
DIRECTORY = -1
#: A choice is the number of crash states that give it, and what it is: a directory's names, or a file's content.
_Choice = tuple[int, dict[str, int] | int]


@dataclass(slots=True)
class _File:
    durable: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Folder:
    now: dict[str, int] = field(default_factory=dict)
    durable: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Disk:
    """Holds everything as the running system sees it after a cut, and says what of it is durable. Node 0 is the
    root."""

    files: dict[int, _File] = field(default_factory=dict)
    folders: dict[int, _Folder] = field(default_factory=lambda: {0: _Folder()})


class CrashModel:
    """Walks the crash states of one trace. ``hide`` names what recovery never looks into. Not thread-safe.

    ``sampled`` becomes true where a file had too many choices to walk them all.
    """

    def __init__(self, trace: Trace, *, names_with_files: bool = False, hide: tuple[str, ...] = (".tmp-", ".trash-")):
        self.trace = trace
        self.contents: list[bytes] = []
        self.sampled = False
        self._hide = hide
        self._names_with_files = names_with_files
        self._content_ids: dict[bytes, int] = {}
        self._files: dict[tuple[int, ...], Sequence[_Choice]] = {}
        self._folders: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Sequence[_Choice]] = {}
        #: An event that changes names is mapped to folders, and to what their names become.
        self._changes: dict[int, dict[int, Names]] = {}
        self._nodes: dict[int, int] = {}
        self._learn()

    # -- what each event does ----------------------------------------------------------------------------------------

    def _learn(self) -> None:
        """Resolve every path once, in recorded order. Raises ``AssertionError`` where two events that may happen in
        either order do not commute: the recorded order would then not stand for all."""
        folders: dict[int, dict[str, int]] = {0: {}}
        handles: dict[int, int] = {}
        touched: list[tuple[set[object], set[object]]] = []
        for number, event in enumerate(self.trace.events):
            reads: set[object] = set()
            writes: set[object] = set()
            changes: dict[int, dict[str, int | None]] = {}
            if event.kind in ("create", "mkdir", "link", "rename", "exchange", "unlink", "rmdir"):
                at, name = self._resolve(folders, event.path, reads)
                mine = changes.setdefault(at, {})
                if event.kind in ("create", "mkdir"):
                    mine[name] = number + 1
                    if event.kind == "mkdir":
                        folders[number + 1] = {}
                    else:
                        handles[event.handle] = number + 1
                elif event.kind in ("unlink", "rmdir"):
                    mine[name] = None
                else:
                    to, new = self._resolve(folders, event.target, reads)
                    node = folders[at][name]
                    if event.kind == "link":
                        del changes[at]
                    else:
                        mine[name] = folders[to][new] if event.kind == "exchange" else None
                    changes.setdefault(to, {})[new] = node
            elif event.kind == "fsync_directory":
                self._nodes[number] = 0
                if event.path != ".":
                    at, name = self._resolve(folders, event.path, reads)
                    self._nodes[number] = folders[at][name]
                    reads.add((at, name))
            elif event.kind != "mark":
                node = self._nodes[number] = handles[event.handle]
                if event.kind == "write":
                    last = (event.offset + max(len(event.data), 1) - 1) // BLOCK_BYTES
                    writes.update(("block", node, block) for block in range(event.offset // BLOCK_BYTES, last + 1))
                elif event.kind == "truncate":
                    writes.add(("size", node))
                if event.kind in ("write", "reserve"):
                    reads.add(("size", node))
            for at, names in changes.items():
                writes.update((at, name) for name in names)
                for name, child in names.items():
                    if child is None:
                        folders[at].pop(name, None)
                    else:
                        folders[at][name] = child
            self._changes[number] = dict(changes)
            for other, (read, written) in enumerate(touched):
                if not self.trace.before[number] >> other & 1 and (
                    writes & written or writes & read or reads & written
                ):
                    raise AssertionError(f"may happen in either order: {self.trace.events[other]} and {event}")
            touched.append((reads, writes))

    @staticmethod
    def _resolve(folders: Mapping[int, dict[str, int]], path: str, reads: set[object]) -> tuple[int, str]:
        *parts, name = path.split("/")
        at = 0
        for part in parts:
            reads.add((at, part))
            at = folders[at][part]
        return at, name

    # -- one cut -----------------------------------------------------------------------------------------------------

    def _replay(self, cut: int) -> _Disk:
        disk = _Disk()
        events = self.trace.events
        rest = cut
        while rest:
            number = (rest & -rest).bit_length() - 1
            rest &= rest - 1
            kind = events[number].kind
            if kind == "fsync":
                self._sync(disk.files[self._nodes[number]], number)
                if self._names_with_files:
                    self._sync_names(disk, self._nodes[number])
            elif kind == "fsync_directory":
                self._sync(disk.folders[self._nodes[number]], number)
            elif kind in ("write", "truncate", "reserve"):
                disk.files[self._nodes[number]].pending.append(number)
            else:
                if kind == "create":
                    disk.files[number + 1] = _File()
                elif kind == "mkdir":
                    disk.folders[number + 1] = _Folder()
                for at in self._changes[number]:
                    disk.folders[at].pending.append(number)
        return disk

    def _sync(self, what: _File | _Folder, number: int) -> None:
        """Make durable what ended before the sync began; what ran beside it is not covered, or not certainly."""
        covered = [event for event in what.pending if self.trace.before[number] >> event & 1]
        what.durable = what.durable + covered
        what.pending = [event for event in what.pending if event not in covered]

    def _sync_names(self, disk: _Disk, node: int) -> None:
        """Make a file's name durable with it, and its parents' names, as some file systems do."""
        while node:
            event = node - 1
            for at in self._changes[event]:
                folder = disk.folders[at]
                if event in folder.pending:
                    folder.pending.remove(event)
                    folder.durable = [*folder.durable, event]
                node = at

    # -- the choices -------------------------------------------------------------------------------------------------

    def content(self, data: bytes) -> int:
        """Return the number that stands for these bytes in a tree."""
        known = self._content_ids.setdefault(data, len(self.contents))
        if known == len(self.contents):
            self.contents.append(data)
        return known

    def _contents(self, file: _File) -> Sequence[_Choice]:
        """Return what the file may hold, each content with the number of choices that give it."""
        key = (*file.durable, -1, *file.pending)
        known = self._files.get(key)
        if known is None:
            known = self._files[key] = self._choose_contents(file)
        return known

    def _choose_contents(self, file: _File) -> Sequence[_Choice]:
        base = bytearray()
        for event in map(self._event, file.durable):
            _apply(base, event)
        sizes = {len(base)}
        versions: dict[int, set[bytes]] = {}
        image = bytearray(base)
        for event in map(self._event, file.pending):
            _apply(image, event)
            sizes.add(len(image))
            if event.kind == "write":
                last = (event.offset + max(len(event.data), 1) - 1) // BLOCK_BYTES
                for block in range(event.offset // BLOCK_BYTES, last + 1):
                    found = versions.setdefault(block, {_block(base, block)})
                    found.add(_block(image, block))
                    if block * BLOCK_BYTES >= len(base):
                        found.add(b"\xa5" * BLOCK_BYTES)
        blocks = sorted(versions)
        total = len(sizes) * math.prod(len(versions[block]) for block in blocks)
        if total <= _MOST_CHOICES:
            choices: Iterator[Sequence[bytes]] = itertools.product(*(sorted(versions[block]) for block in blocks))
        else:
            self.sampled = True
            choices = _plain_choices([_block(base, b) for b in blocks], [_block(image, b) for b in blocks])
        found_contents: Counter[int] = Counter()
        for chosen in choices:
            whole = bytearray(max(sizes))
            whole[: len(base)] = base
            for block, data in zip(blocks, chosen, strict=True):
                whole[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = data
            for size in sizes:
                found_contents[self.content(bytes(whole[:size]))] += 1
        return [(count, content) for content, count in found_contents.items()]

    def _event(self, number: int) -> Event:
        return self.trace.events[number]

    def _names(self, at: int, folder: _Folder) -> Sequence[_Choice]:
        """Return which names the directory may have, each set with the number of choices that give it."""
        key = (at, tuple(folder.durable), tuple(folder.pending))
        known = self._folders.get(key)
        if known is not None:
            return known
        base: dict[str, int] = {}
        for event in folder.durable:
            _rename(base, self._changes[event][at])
        found: dict[tuple[tuple[str, int], ...], int] = {}
        for chosen in _in_order([set(self._changes[event][at]) for event in folder.pending]):
            names = dict(base)
            for index in chosen:
                _rename(names, self._changes[folder.pending[index]][at])
            entry = tuple(sorted(names.items()))
            found[entry] = found.get(entry, 0) + 1
        options = self._folders[key] = [(count, dict(entry)) for entry, count in found.items()]
        return options

    def _count_names(self, at: int, folder: _Folder) -> int:
        """Count the choices without making them: names that nothing links are independent."""
        if len(folder.pending) < 8:
            return sum(count for count, _ in self._names(at, folder))
        groups: list[tuple[set[str], list[set[str]]]] = []
        for event in folder.pending:
            names = set(self._changes[event][at])
            joined = [group for group in groups if group[0] & names]
            groups = [group for group in groups if not group[0] & names]
            merged = [item for group in joined for item in group[1]]
            groups.append((names.union(*(group[0] for group in joined)), [*merged, names]))
        return math.prod(sum(1 for _ in _in_order(group)) for _, group in groups)

    # -- the states --------------------------------------------------------------------------------------------------

    def states(self, cut: int) -> Iterator[tuple[int, Tree]]:
        """Yield the trees that a power loss after ``cut`` may leave, each with the number of crash states that give it.
        A tree may come more than once. Its items are paths, sorted, with a content's number or ``DIRECTORY``."""
        disk = self._replay(cut)
        counts = {
            **{node: sum(c for c, _ in self._contents(file)) for node, file in disk.files.items() if file.pending},
            **{node: self._count_names(node, f) for node, f in disk.folders.items() if f.pending},
        }
        everything = math.prod(counts.values())
        for weight, walked, tree in self._walk(disk, [("", 0)], {}, []):
            yield everything // math.prod(counts.get(node, 1) for node in walked) * weight, tree

    def _walk(
        self, disk: _Disk, todo: list[tuple[str, int]], chosen: dict[int, _Choice], found: list[tuple[str, int]]
    ) -> Iterator[tuple[int, set[int], Tree]]:
        """Choose for one directory or file after the other, in the order in which the walk comes to them."""
        while todo:
            path, node = todo.pop()
            if node not in chosen:
                options = self._options(disk, node)
                if len(options) > 1:
                    for option in options:
                        yield from self._walk(disk, [*todo, (path, node)], {**chosen, node: option}, list(found))
                    return
                chosen[node] = options[0]
            what = chosen[node][1]
            if isinstance(what, int):
                found.append((path, what))
                continue
            if path:
                found.append((path, DIRECTORY))
            for name, child in what.items():
                if name.startswith(self._hide):
                    found.append((os.path.join(path, name), DIRECTORY))
                else:
                    todo.append((os.path.join(path, name), child))
        yield math.prod(weight for weight, _ in chosen.values()), set(chosen), tuple(sorted(found))

    def _options(self, disk: _Disk, node: int) -> Sequence[_Choice]:
        if node in disk.folders:
            return self._names(node, disk.folders[node])
        return self._contents(disk.files[node])

    def items(self, tree: Tree) -> list[tuple[str, bytes | None]]:
        """Return the tree with its bytes, as ``MemoryOps`` takes it."""
        return [(path, None if number == DIRECTORY else self.contents[number]) for path, number in tree]


def _apply(image: bytearray, event: Event) -> None:
    if event.kind == "write":
        end = event.offset + len(event.data)
        image.extend(bytes(max(0, end - len(image))))
        image[event.offset : end] = event.data
    else:
        size = event.value[0]
        image.extend(bytes(max(0, size - len(image))))
        if event.kind == "truncate":
            del image[size:]


def _block(image: bytearray, block: int) -> bytes:
    data = bytes(image[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
    return data + bytes(BLOCK_BYTES - len(data))


def _plain_choices(old: list[bytes], new: list[bytes]) -> Iterator[list[bytes]]:
    yield old
    yield new
    for at in range(len(old)):
        yield [*new[:at], old[at], *new[at + 1 :]]
        yield [*old[:at], new[at], *old[at + 1 :]]
        yield [*new[:at], *old[at:]]


def _rename(names: dict[str, int], changes: Names) -> None:
    for name, node in changes.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _in_order(touched: Sequence[set[str]]) -> Iterator[list[int]]:
    """Yield every subset of changes that holds, with a change, the earlier ones of the same names."""
    needs = [[j for j in range(i) if touched[j] & touched[i]] for i in range(len(touched))]
    stack: list[tuple[list[int], int]] = [([], 0)]
    while stack:
        chosen, first = stack.pop()
        yield chosen
        for index in range(first, len(touched)):
            if all(need in chosen for need in needs[index]):
                stack.append(([*chosen, index], index + 1))
