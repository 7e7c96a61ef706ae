"""The flow `reconcile`: the feedback database owns opinions and promotions; what merely mirrors it is brought in line."""

from __future__ import annotations

import logging
from uuid import UUID

from prefect import flow
from prefect.runtime import flow_run

from flows.environment import environment
from flows.flowrun import close_zombies
from flows.record import Records
from flows.retrain import open_store

log = logging.getLogger("thumbwheel.flow")


@flow(name="reconcile")
def reconcile() -> None:
    """Close what killed processes left open, and let MLflow's alias `champion` name the model that reigns.

    Batches that nobody consumed are rung again by the bell.
    """
    records = Records(environment().root)
    close_zombies(records, UUID(str(flow_run.get_id())))
    store = open_store()
    try:
        champion = store.champion()
    finally:
        store.close()
    if champion is not None:
        try:
            records.set_alias("champion", champion.model_hash)
        except LookupError as error:
            log.warning("the champion cannot be marked in MLflow: %s", error)
