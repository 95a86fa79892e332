"""``SaveBuilder`` makes a save: it agrees on the layout with the other ranks, provides memory, and builds the
transaction."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import torch

from asyncckpt import formats
from asyncckpt.assets import Assets, check_places, join_assets, read_assets
from asyncckpt.background.choice import why_threads
from asyncckpt.background.writer import BackgroundWriter
from asyncckpt.catalog.quarantine import Quarantine
from asyncckpt.catalog.steps import Claim, StepRegistry
from asyncckpt.codecs import codecs
from asyncckpt.commit.committer import Committer
from asyncckpt.commit.in_flight import Save
from asyncckpt.commit.publisher import Publisher, Solo
from asyncckpt.commit.transaction import SaveTransaction
from asyncckpt.errors import AsyncCkptError
from asyncckpt.events import EventBus
from asyncckpt.formats.options import Files
from asyncckpt.manifest.draft import config_tree, contents_of
from asyncckpt.memory.arena import Arena
from asyncckpt.memory.available import default_budget
from asyncckpt.memory.buffers import padded
from asyncckpt.plan.layout import LayoutCache
from asyncckpt.plan.planned import Planned, alone
from asyncckpt.protocols import LiesInFile, Store
from asyncckpt.ranks.collective_save import Follower, Leader, RankSave
from asyncckpt.ranks.coordinator import Coordinator
from asyncckpt.ranks.replicas import ReplicaSample, whole_digests
from asyncckpt.scope import SaveScope
from asyncckpt.stage.image import slot_bytes
from asyncckpt.stage.places import cuda_devices
from asyncckpt.state.capture import check_state
from asyncckpt.state.known_states import KnownStates
from asyncckpt.state.markers import without_owners
from asyncckpt.storage.lease import HeldLease
from asyncckpt.storage.local import LocalStore
from asyncckpt.types import Layout, LayoutOptions, pieces_of
from asyncckpt.write.encoder import Encoder
from asyncckpt.write.options import WriterOptions
from asyncckpt.write.reuse import ReuseSource
from asyncckpt.write.threads import Pools

log = logging.getLogger("asyncckpt")


class SaveBuilder:
    """Holds what the saves of one checkpointer share, and makes each of them. For the training thread.

    ``config``: plain values for every manifest. ``assets``: those of every checkpoint. ``replace``: saving a step
    again replaces it. ``lease``, ``quarantine``, ``steps``: the run's, which a background process needs. The options
    are those of ``Checkpointer``.
    """

    def __init__(
        self,
        *,
        files: Files,
        layout: LayoutOptions,
        writer: WriterOptions,
        budget_bytes: int | None,
        check_replicas: bool,
        config: Any,
        assets: Mapping[str, bytes],
        replace: bool,
        store: Store,
        events: EventBus,
        committer: Committer,
        reuse: ReuseSource,
        lease: HeldLease,
        quarantine: Quarantine,
        steps: StepRegistry,
    ) -> None:
        self._format = formats.get(files.format)
        self._codec = codecs.get(files.codec)
        self._chain = files.chain
        self._writer = writer
        self._config = config_tree(config)
        self._assets = assets
        self._replace = replace
        self._check_replicas = check_replicas
        self._budget_bytes = budget_bytes
        self._store = store
        self._events = events
        self._committer = committer
        self._source = reuse
        self._reuse = reuse if writer.reuse_unchanged else None
        self._known = KnownStates(events)
        self._layouts = LayoutCache(self._format, self._codec, layout)
        #: Identifies the layout for which the arena was last found large enough.
        self._fits: tuple[int, int, str] | None = None
        self.arena = Arena()
        self._lease = lease
        self._quarantine = quarantine
        self._steps = steps
        #: Where the saves of this checkpointer are written: None for threads. ``grow_arena`` decides, once.
        self.background: BackgroundWriter | None = None
        self._decided = False
        #: How many ranks of the job run on this host, and stage in its memory.
        self._sharing = 1
        self.pools = Pools(writer.threads)
        self._encoder = Encoder(self._codec, writer.threads)

    def close(self) -> None:
        """End the threads and the process that write, once what was submitted is done. Waits for the process, for
        seconds at most. Idempotent."""
        self.pools.close()
        if self.background is not None:
            self.background.close()

    @property
    def splits(self) -> bool:
        """Whether chunks may be staged as planes; not where differences are saved, which are those of whole items."""
        return self._encoder.splits and not self._chain

    def plan(
        self,
        coordinator: Coordinator | None,
        state: Mapping[str, Any],
        step: int,
        *,
        weights_only: bool,
        call: str,
        number: int | None = None,
    ) -> Planned:
        """Capture the state and plan its layout. ``call`` names this planning among all of the job's; ``number`` is
        that of the save, None where nothing is saved yet. In a job, blocks where names or shapes are new, until all
        ranks have called. Raises as ``capture`` and ``JobPlanner.plan`` do, ``PlanChanged`` among them."""
        try:
            recognise = coordinator is None and number is not None
            captured = self._known.capture(state, step, weights_only=weights_only, recognise=recognise)
        except BaseException as error:
            if coordinator is not None and number is None:  # of a save that failed, the coordinator tells the others
                with contextlib.suppress(AsyncCkptError):
                    coordinator.planner.decline(call, error)
            raise
        snapshot = captured.snapshot
        if coordinator is not None:
            self._sharing = coordinator.ranks_here
            planner = coordinator.planner
            if self._committer.plan_changed.is_set():
                self._committer.plan_changed.clear()
                planner.invalidate()
            ask = number is not None and not planner.is_cached(snapshot)
            cancel_key = coordinator.replan(number) if ask and number is not None else None
            return planner.plan(snapshot, call, cancel_key, gather=number is not None)
        again, known = captured.again, captured.known
        if again is None:
            for piece in snapshot.pieces() if number is not None else ():
                if piece.redistribute is not None:
                    piece.tensor = piece.redistribute()
        if again is not None and again.is_same and known is not None:
            layout: Layout = known.cache["layout"]
        else:
            layout = self._layouts.get(
                tuple((one.name, tuple(pieces_of(one.pieces).specs)) for one in snapshot.components)
            )
        if again is None and known is not None:
            known.cache["layout"] = layout
        return alone(captured, layout)

    def _decide(self, coordinator: Coordinator | None, planned: Planned) -> None:
        """Choose, the first time, whether a process writes, and start it then: it takes half a second to come."""
        if self._decided:
            return
        self._decided = True
        why = why_threads(self._writer, self._store, self._codec, planned.layout.nbytes, alone=coordinator is None)
        if why is None:
            self.arena.shared = True
            assert isinstance(self._store, LocalStore)
            self.background = BackgroundWriter(
                store=self._store,
                lease=self._lease,
                codec=self._codec,
                chain=self._chain,
                options=self._writer,
                arena=self.arena,
                reuse=self._source,
                quarantine=self._quarantine,
                steps=self._steps,
                events=self._events,
                prune=self._committer.prune,
            )
            self.background.start()
        elif self._writer.process == "always":
            log.warning("no background process: %s; threads of the trainer write", why)

    def grow_arena(self, coordinator: Coordinator | None, planned: Planned) -> None:
        """Give the arena the memory that a save of this layout takes. Returns at once: the memory is faulted in in the
        background. Raises ``NotEnoughMemory``."""
        self._decide(coordinator, planned)
        extents = planned.layout.extents()
        key = len(extents), planned.layout.nbytes, planned.layout.fingerprint
        if key == self._fits:  # the arena never shrinks
            return
        sizes = [slot_bytes(extent) for extent in extents]
        budget = default_budget(sizes, self._sharing) if self._budget_bytes is None else self._budget_bytes
        devices = sorted(cuda_devices(pieces_of(planned.pieces).tensors), key=str)
        self.arena.grow(budget, largest_bytes=max(sizes, default=0), pin=next(iter(devices), None))
        if self.arena.budget_bytes >= (self._budget_bytes or sum(map(padded, sizes))):
            self._fits = key

    def assets_of(
        self, coordinator: Coordinator | None, state: Mapping[str, Any], own: Assets | None
    ) -> Mapping[str, bytes]:
        """Return the assets of a save that is given ``own``, which are read now, with those that components of the
        state bring; in a job, none on ranks other than 0. Raises as ``read_assets`` does."""
        if coordinator is not None and not coordinator.leads:
            return {}
        check_state(state)
        brought: dict[str, bytes] = {}
        for component in without_owners(state)[0].values():
            if isinstance(component, torch.nn.Module) and isinstance(component, LiesInFile):
                brought |= component.checkpoint_assets()
        limit = self._writer.asset_bytes
        common = join_assets(brought, self._assets, limit) if brought else self._assets
        return join_assets(common, read_assets(own, limit), limit) if own is not None else common

    def build(
        self,
        coordinator: Coordinator | None,
        planned: Planned,
        number: int,
        claim: Claim,
        kind: str,
        metrics: dict[str, float],
        assets: Mapping[str, bytes],
        began: float,
    ) -> Save:
        """Make the save that writes what is planned; nothing is written yet. ``number`` is the save's among the
        job's, ``assets`` are what ``assets_of`` returned, ``began`` when the save was asked for, by
        ``time.perf_counter``."""
        if assets and self._format.name == "zarr":
            check_places(assets, (component.name for component in planned.components))
        contents = contents_of(
            planned.components,
            planned.layout,
            step=planned.step,
            name=claim.directory,
            names=claim.names,
            sequence=claim.sequence,
            kind=kind,
            metrics=metrics,
            shard_format=self._format.name,
            codec=self._codec,
            digest=self._writer.digest,
            config=self._config,
            assets=assets,
            replace=self._replace,
            attempt=coordinator.attempt(number) if coordinator is not None else None,
            world_size=coordinator.ranks.size if coordinator is not None else 1,
        )
        scope = SaveScope(planned.step)
        if self.background is not None:
            remote = self.background.save(contents, scope, began)
            if remote is not None:
                return remote
        return SaveTransaction(
            contents,
            scope,
            self._publisher(coordinator, planned, number),
            store=self._store,
            space=self._committer,
            source=self._reuse,
            chain=self._chain,
            pools=self.pools,
            arena=self.arena,
            encoder=self._encoder,
            events=self._events,
            started_seconds=began,
        )

    def _publisher(self, coordinator: Coordinator | None, planned: Planned, number: int) -> Publisher:
        if coordinator is None:
            return Solo()
        rank = coordinator.ranks.rank
        rank_save = RankSave(
            coordinator.ranks,
            number,
            planned.rank_local_names,
            planned.sends_values_of,
            planned.values_like,
            planned.owners,
            ReplicaSample(planned, number, rank),
            whole_digests(planned, rank) if self._check_replicas else {},
            planned.met,
            coordinator.asked_again,
            planned.spread,
        )
        return Leader(rank_save) if coordinator.leads else Follower(rank_save)
