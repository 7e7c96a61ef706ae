"""A person's word before a promotion (params.yaml: approval.mode): what waits for it, the question, the answer carried out.

The gate's "promote" then becomes a question: the candidate's folder and the judge's report are kept, and a run of the flow
`approve` suspends with a form in Prefect's page. Neither a process nor the workspace waits for the answer, retraining goes
on meanwhile, and the question outlives a restart of every server. Who waits stands in .thumbwheel/approvals/<hash>.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from flows.files import write_text

if TYPE_CHECKING:
    from feedback.store import Store
    from flows.record import Records

Mode = Literal["none", "required"]
Word = Literal["promote", "reject"]
FOLDER = ".thumbwheel/approvals"
DEPLOYMENT = "approve/approve"
log = logging.getLogger("thumbwheel.approval")


@dataclass(frozen=True)
class ApprovalOptions:
    """Section `approval` of params.yaml. mode: none, or required; hours: so long a question waits, then the champion stays."""

    mode: Mode = "none"
    hours: float = 168.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is none or required, not {self.mode}")
        if not self.hours > 0:
            raise ValueError(f"hours must be above 0, it is {self.hours}")


@dataclass(frozen=True)
class Question:
    """A candidate that waits for a word, or had one: `word` is then promote or reject."""

    candidate: str
    report: dict[str, Any]
    reasons: list[str]
    asked_at: str
    word: str = ""
    by: str = ""
    comment: str = ""

    @property
    def text(self) -> str:
        """What became of it, for people."""
        said = f" by {self.by}" if self.by else ""
        return f"{self.word}{said}{': ' + self.comment if self.comment else ''}" if self.word else "waits for approval"


def place(root: Path, candidate: str) -> Path:
    """The file of a question."""
    return root / FOLDER / f"{candidate}.json"


def read(root: Path, candidate: str) -> Question | None:
    """The question about a candidate, if one was asked."""
    path = place(root, candidate)
    return Question(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def write(root: Path, question: Question) -> None:
    """Keep a question, or its answer."""
    write_text(place(root, question.candidate), json.dumps(question.__dict__, ensure_ascii=False, indent=1) + "\n")


def waiting(root: Path) -> list[Question]:
    """The questions without an answer, the oldest first."""
    folder = root / FOLDER
    found = [read(root, path.stem) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    return sorted((each for each in found if each and not each.word), key=lambda each: each.asked_at)


def ask(root: Path, report: Mapping[str, Any], reasons: list[str], hours: float) -> Question:
    """Ask, once for a candidate against a champion: keep the question, then start the run of `approve` that suspends.

    Raises RuntimeError when no runner offers that deployment.
    """
    candidate, champion = (str(report[role]["model_hash"]) for role in ("candidate", "champion_before"))
    question = read(root, candidate)
    if question is None or question.report["champion_before"]["model_hash"] != champion:
        question = Question(candidate, dict(report), reasons, datetime.now(UTC).isoformat())
        write(root, question)
    if not question.word:
        start(candidate, champion, hours)
    return question


def start(candidate: str, champion: str, hours: float) -> None:
    """Start the run of the deployment `approve` for this question, once, and do not wait for it."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound as error:
            raise RuntimeError(
                "params.yaml: approval.mode is required, but nothing offers the deployment approve: `make up` does"
            ) from error
        client.create_flow_run_from_deployment(
            deployment.id,
            parameters={"candidate": candidate, "hours": hours},
            name=f"approve {candidate[:12]}",
            idempotency_key=f"approve {candidate} against {champion}",
        )


def carry_out(root: Path, store: Store, records: Records, question: Question, word: Word, by: str, comment: str) -> str:
    """Do what was said: the promotion's row with who and why, or none; MLflow's version says it too. Returns the outcome.

    Raises StaleChampion when another model reigns by now than the one that the candidate was judged against.
    """
    from flows import card
    from flows.promote import MODELS, mirror, numbers, origin

    candidate, answered = question.candidate, replace(question, word=word, by=by, comment=comment)
    if word == "promote":
        approval = {"by": by, "comment": comment, "at": datetime.now(UTC).isoformat()}
        store.promote(
            model_hash=candidate,
            model_path=f"{MODELS}/{candidate}",
            figures={**numbers(question.report), **origin(root, records, candidate), "approval": approval},
            reason=f"{question.reasons[0]}; a person said {answered.text}",
            expected_champion=str(question.report["champion_before"]["model_hash"]),
        )
    write(root, answered)
    mirror(store, records, challenger=None if word == "promote" else candidate)
    if (version := records.find_version(candidate)) is not None:
        records.client.set_model_version_tag(version.name, version.version, "thumbwheel.approval", answered.text[:5000])
    if word == "promote" and (row := store.champion()) is not None and row.model_hash == candidate:
        card.write(root, row, records, question.report)
    return answered.text


def form(question: Question) -> str:
    """The text above the form, in markdown. Nothing that people wrote is in it."""
    rows = [("thumbs up", "thumbs_up_rate"), ("second judge", "second_judge_rate"), ("relevance", "relevance")]
    rows += [
        ("KL, nats an answer", "kl_per_answer"),
        ("perplexity", "perplexity"),
        ("distinct answers", "distinct_answers"),
    ]
    report = question.report

    def cell(role: str, key: str) -> str:
        value = report[role].get(key)
        return f"{value:.3f}" if isinstance(value, float) else "–"

    table = [f"| {title} | {cell('champion_before', key)} | {cell('candidate', key)} |" for title, key in rows]
    reasons = [f"- {reason}" for reason in question.reasons]
    lines = [
        f"# Shall {question.candidate[:12]} answer people?",
        "",
        "| | champion | candidate |",
        "| --- | ---: | ---: |",
    ]
    return "\n".join([*lines, *table, "", "The gate says promote:", "", *reasons])
