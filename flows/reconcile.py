"""The flow `reconcile`: the feedback database owns opinions and promotions; what merely mirrors it is brought in line."""

from __future__ import annotations

from uuid import UUID

from prefect import flow
from prefect.runtime import flow_run

from flows import probation, settings
from flows.environment import environment
from flows.erasure import catch_up
from flows.flowrun import close_zombies, mark
from flows.promote import mirror
from flows.record import Records
from flows.retrain import open_store


@flow(name="reconcile", retries=2, retry_delay_seconds=20, timeout_seconds=600)
def reconcile() -> None:
    """Close what killed processes left open, let MLflow's aliases say what the promotion table says, and see to erasures.

    A champion that people like less than the one before is rolled back first. Batches that nobody consumed are rung
    again by the bell.
    """
    root = environment().root
    records = Records(root)
    mark(UUID(str(flow_run.get_id())))
    close_zombies(records)
    store = open_store()
    try:
        probation.watch(store, settings.load(root).probation)
        mirror(store, records)
        catch_up(root, store, records)
    finally:
        store.close()
