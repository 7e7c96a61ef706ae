"""The flow `approve`: asks a person about one candidate by a form in Prefect's page, and does what they say."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow, get_run_logger, suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed, State
from pydantic import Field

from flows import approval
from flows.environment import environment
from flows.record import Records
from flows.retrain import open_store


class Answer(RunInput):
    """The form."""

    decision: Literal["promote", "reject"] = Field(description="promote: the candidate serves from now on")
    by: str = Field("", max_length=200, description="who decides")
    comment: str = Field("", max_length=2000, description="why; it stands in the promotion's row and in MLflow")


@flow(name="approve", persist_result=True)
def approve(candidate: str, hours: float = 168.0) -> State[Any]:
    """Suspend until somebody says what becomes of a candidate; after `hours` the champion stays.

    The run's process ends while it waits, and begins anew with the answer. candidate: the model's hash.
    """
    root = environment().root
    question = approval.read(root, candidate)
    if question is None or question.word:
        return Completed(name="NothingToDo", message=f"nothing waits for approval about {candidate[:12]}")
    asked = Answer.with_initial_data(description=approval.form(question))
    answer = suspend_flow_run(wait_for_input=asked, timeout=int(hours * 3600), key="approval")
    store = open_store()
    try:
        told = approval.carry_out(
            root, store, Records(root), question, answer.decision, answer.by.strip(), answer.comment.strip()
        )
    finally:
        store.close()
    get_run_logger().info("%s: %s", candidate[:12], told)
    return Completed(name="Promoted" if answer.decision == "promote" else "Rejected", message=told)
