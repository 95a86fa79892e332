"""Planted bugs: an older checkpoint is read for the newest, and annotations are lost or believed too soon."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asyncckpt import run
from asyncckpt.catalog import annotations, catalog, chosen, newest, remains
from asyncckpt.commit.pruner import Pruner
from asyncckpt.read import verify
from faults import reading_checks as checks
from faults.mutants.registry import Patch, around, mutant


@mutant("the newest checkpoint that is whole is read for the newest", checks.a_damaged_newest_is_refused)
def _(patch: Patch) -> None:
    def whole(original: Any, entries: Any, kind: Any = None) -> Any:
        return original([entry for entry in entries if entry.damage is None], kind)

    around(patch, newest, "newest", whole)


@mutant("what is left of a checkpoint is taken for none", checks.an_emptied_newest_is_refused)
def _(patch: Patch) -> None:
    patch.setattr(remains, "emptied", lambda *_: [])


@mutant(
    "a checkpoint that cannot be read counts by its step",
    checks.what_was_saved_after_going_back_is_the_newest_though_unreadable,
)
def _(patch: Patch) -> None:
    patch.setattr(newest, "hint", lambda store: "")


@mutant("another tool's checkpoints are taken for ours", checks.what_others_keep_beside_is_not_the_newest)
def _(patch: Patch) -> None:
    patch.setattr(remains, "without_others", lambda store, found: dict(found))


@mutant("damage is only looked for in the step that was named", checks.a_damaged_newest_is_refused)
def _(patch: Patch) -> None:
    def opened(original: Any, store: Any, step: Any) -> Any:
        usable = [e for e in catalog.Catalog(store, store.address).entries() if e.damage is None]
        return original(store, usable[-1].step if step is None else step)

    original = chosen.open_chosen
    for room in (run, chosen):
        patch.setattr(room, "open_chosen", lambda store, step: opened(original, store, step))


@mutant("components that are not there are not missed", checks.a_missing_component_is_found)
def _(patch: Patch) -> None:
    patch.setattr(verify, "_missing_components", lambda manifest, require: [])


@mutant("the writer does not look at annotations", checks.annotations_decide_what_is_kept)
def _(patch: Patch) -> None:
    def entries(original: Any, self: Pruner) -> Any:
        seen, own, _ = original(self)
        bare = [replace(one, metrics={k: v for k, v in one.metrics.items() if k not in one.annotated}) for one in own]
        return seen, bare, catalog_plan(bare, self.policies)

    from asyncckpt.catalog.retention import plan as catalog_plan

    around(patch, Pruner, "_plan", entries)


@mutant("a second annotation takes the place of the first", checks.annotations_decide_what_is_kept)
def _(patch: Patch) -> None:
    def add(original: Any, self: annotations.Annotations, attempt: str, metrics: Any) -> Any:
        self.remove({attempt})
        return original(self, attempt, metrics)

    around(patch, annotations.Annotations, "add", add)


@mutant("annotations are kept by the step", checks.an_annotation_belongs_to_one_save)
def _(patch: Patch) -> None:
    def marked(original: Any, self: catalog.Catalog, rows: Any) -> Any:
        found = original(self, rows)
        given = [note.metrics for note in self.annotations.all().values()]
        return [replace(row, metrics={**row.metrics, **(given[0] if given else {})}) for row in found]

    around(patch, catalog.Catalog, "_with_marks", marked)


@mutant(
    "an annotation that cannot be read counts as none", checks.an_annotation_that_cannot_be_read_lets_nothing_be_deleted
)
def _(patch: Patch) -> None:
    def all_(original: Any, self: annotations.Annotations) -> Any:
        return {attempt: note for attempt, note in original(self).items() if note.problem is None}

    around(patch, annotations.Annotations, "all", all_)


@mutant("annotations are not checked", checks.an_annotation_that_cannot_be_read_lets_nothing_be_deleted)
def _(patch: Patch) -> None:
    def parsed(self: annotations.Annotations, key: str, attempt: str) -> annotations.Annotation:
        body = annotations.loads(self._store.open(annotations.ANNOTATIONS).read_small(key, 10_000), key)
        return annotations.Annotation(body["metrics"])  # type: ignore[call-overload, index, arg-type]

    patch.setattr(annotations.Annotations, "_parsed", parsed)


@mutant("retention deletes by a plan that is old", checks.what_is_annotated_while_others_are_deleted_stays)
def _(patch: Patch) -> None:
    patch.setattr(catalog.Catalog, "marks", lambda self: None)


@mutant("annotations outlive their checkpoint", checks.an_annotation_goes_with_its_checkpoint)
def _(patch: Patch) -> None:
    patch.setattr(Pruner, "_clear_annotations", lambda self, deleted: None)


@mutant("any name is taken for a metric's", checks.a_name_that_nobody_can_type_is_refused)
def _(patch: Patch) -> None:
    patch.setattr(catalog, "check_names", lambda metrics: None)
