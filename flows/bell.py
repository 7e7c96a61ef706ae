"""The bell: opens a batch when enough opinions wait (or the oldest has waited long enough) and rings for a retraining.

The store decides in one transaction which opinions a batch holds; the Prefect event that follows is only a nudge. It
may get lost, so batches that nobody consumed are rung again, at start-up and from time to time. The same process looks
at how people like the champion (probation.py).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from feedback.store import Batch, Store
    from feedback.trust_options import TrustOptions
    from flows.settings import BellOptions

EVENT = "feedback.batch.ready"
RESOURCE = "thumbwheel.feedback-batch"
POLL_SECONDS = 2.0
PROBATION_SECONDS = 10.0  # between looks at how people like the champion
REMIND_SECONDS = 30.0  # doubled with every ring for the same batch: a retraining that fails is not begun all the time
REMIND_AT_MOST_SECONDS = 3600.0
# a retraining that is said to be under way for longer than this may be a dead one: ring all the same
PATIENCE_SECONDS = 900.0

log = logging.getLogger("thumbwheel.bell")


class Bell:
    """Looks at the store (`turn`), opens at most one batch a turn and rings.

    ring: tells the world of a batch; busy: whether a retraining already waits or runs; clock: seconds, monotonic.
    """

    def __init__(
        self,
        store: Store,
        options: BellOptions,
        trust: TrustOptions,
        ring: Callable[[Batch], None],
        busy: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.options, self.trust = store, options, trust
        self.ring, self.busy, self.clock = ring, busy, clock
        self.rung: dict[int, tuple[float, int]] = {}  # batch -> when it was rung for last, and how often

    def turn(self) -> list[Batch]:
        """One look. Returns the batches that were rung for."""
        rung = []
        batch = self._open()
        if batch is not None:
            log.info("batch %s opened", batch.id)
            rung.append(batch)
        due = [b for b in self.store.open_batches() if self._due(b) and (batch is None or b.id != batch.id)]
        if due and (not self.busy() or all(self._waited(b) > PATIENCE_SECONDS for b in due)):
            rung.extend(due)
        for each in rung:
            self.ring(each)
            self.rung[each.id] = (self.clock(), self._times(each) + 1)
        return rung

    def _open(self) -> Batch | None:
        pending = self.store.pending(self.trust)
        if pending.count >= self.options.opinions:
            return self.store.open_batch(self.options.opinions, self.trust)
        if pending.oldest_at is not None and _age(pending.oldest_at) >= self.options.max_wait_seconds:
            return self.store.open_batch(1, self.trust)
        return None

    def _waited(self, batch: Batch) -> float:
        return self.clock() - self.rung[batch.id][0] if batch.id in self.rung else float("inf")

    def _times(self, batch: Batch) -> int:
        return self.rung[batch.id][1] if batch.id in self.rung else 0

    def _due(self, batch: Batch) -> bool:
        pause = min(REMIND_AT_MOST_SECONDS, REMIND_SECONDS * 2 ** max(0, min(self._times(batch), 20) - 1))
        return self._waited(batch) >= pause


def _age(moment: datetime) -> float:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (datetime.now(UTC) - aware).total_seconds()


def emit(batch: Batch) -> None:
    """Send the Prefect event of a batch (in the background: a short process must end normally for it to leave)."""
    from prefect.events import emit_event

    emit_event(event=EVENT, resource={"prefect.resource.id": f"{RESOURCE}.{batch.id}"}, payload={"batch_id": batch.id})


def retraining_under_way() -> bool:
    """Whether the deployment `retrain` has a flow run that is scheduled, pending or running."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, FlowRunFilter
    from prefect.client.schemas.objects import StateType

    active = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": active}}}),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=["retrain"])),
            limit=1,
        )
    return bool(runs)


def watch(root: Path, stop: threading.Event) -> None:
    """Turn until `stop` is set, with the options that params.yaml has at that moment."""
    from feedback.store import Store
    from flows import probation, servers, settings

    store = Store(servers.database_url(root))
    store.migrate()
    params = settings.load(root)
    bell = Bell(store, params.bell, params.trust, emit, retraining_under_way)
    stamp = (root / settings.PARAMS_FILE).stat().st_mtime_ns
    log.info("listening: a batch at %s opinions or after %s s", bell.options.opinions, bell.options.max_wait_seconds)
    servers.ready_path(root, "bell").write_text(str(os.getpid()))
    next_look = time.monotonic()
    try:
        while not stop.wait(POLL_SECONDS):
            try:
                changed = (root / settings.PARAMS_FILE).stat().st_mtime_ns
                if changed != stamp:
                    params, stamp = settings.load(root), changed
                    bell.options, bell.trust = params.bell, params.trust
                for batch in bell.turn():
                    log.info("rang for batch %s", batch.id)
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + PROBATION_SECONDS
                    if probation.watch(store, params.probation):
                        mirror_crown(root, store)
            except Exception:  # the database or Prefect is away for a moment: the next turn makes up for it
                log.exception("this turn failed; the next one is in %s s", POLL_SECONDS)
    finally:
        store.close()


def mirror_crown(root: Path, store: Store) -> None:
    """Let MLflow's aliases follow a rollback at once; MLflow is loaded only now, as this hardly ever happens."""
    from flows.promote import mirror
    from flows.record import Records

    mirror(store, Records(root))


def main() -> None:
    """The process that `thumbwheel up` starts; ends at SIGTERM."""
    from flows import servers

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    root = servers.workspace()
    watch(root, stop)


if __name__ == "__main__":
    main()
