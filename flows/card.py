"""The model card of a promoted version: README.md in its folder, and the description of its version in MLflow's registry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.files import write_text
from flows.lineage import BATCHES

if TYPE_CHECKING:
    from feedback.promotions import Promotion
    from flows.record import Records

ROLES = (("sft", "SFT"), ("champion_before", "champion before"), ("candidate", "this model"))
FIGURES = (
    *("thumbs_up_rate", "second_judge_rate", "relevance", "kl_per_answer", "perplexity", "next_turn_accuracy"),
    *("distinct_answers", "most_common_share", "ended_share", "length_characters"),
)


def write(root: Path, promotion: Promotion, records: Records, report: Mapping[str, Any] | None) -> None:
    """Write the card of what was promoted to its two places; report: the judge's, None for a first champion."""
    version = records.find_version(promotion.model_hash)
    tags = dict(version.tags) if version is not None else {}
    text = markdown(promotion, tags, report)
    write_text(root / promotion.model_path / "README.md", f"---\nlibrary_name: transformers\n---\n{text}")
    if version is not None:
        records.client.update_model_version(version.name, version.version, text)


def markdown(promotion: Promotion, tags: Mapping[str, str], report: Mapping[str, Any] | None) -> str:
    """The card: where the model comes from, what it learned from, its figures, its limits."""
    figures = promotion.figures
    facts = [
        ("weights", promotion.model_hash),
        ("made by stage", tags.get("dvc.stage", "")),
        ("batches of opinions", tags.get(BATCHES, "") or "none"),
        ("data (DVC)", figures.get("data_revision", "")),
        ("code", figures.get("code_revision", "")),
        ("MLflow run", figures.get("mlflow_run_id", "")),
        ("promoted", f"{promotion.created_at:%F %H:%M} UTC: {one_line(promotion.reason)}"),
    ]
    lines = [f"# {promotion.model_hash[:12]}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts if value]
    lines += ["", *(judgement(report) if report else ["It was the first champion: nobody judged it."])]
    lines += ["", "## Limits", "", *(f"- {each}" for each in limits(tags, report))]
    return "\n".join(lines) + "\n"


def judgement(report: Mapping[str, Any]) -> list[str]:
    """The judge's figures as a table, with intervals where there are some."""

    def cell(found: Mapping[str, Any], key: str) -> str:
        value, low, high = (found.get(name) for name in (key, f"{key}_low", f"{key}_high"))
        if not isinstance(value, float):
            return "–"
        return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if isinstance(low, float) else "")

    titles = " | ".join(title for _, title in ROLES)
    lines = [
        f"## On {report['prompts']} prompts that nobody trained on",
        "",
        f"| figure | {titles} |",
        "| --- |" + " ---: |" * 3,
    ]
    for key in FIGURES:
        if key in report["candidate"]:
            lines.append(
                f"| {key.replace('_', ' ')} | " + " | ".join(cell(report[role], key) for role, _ in ROLES) + " |"
            )
    return lines


def limits(tags: Mapping[str, str], report: Mapping[str, Any] | None) -> list[str]:
    """What nobody should take from it."""
    found = [
        "The figures are of the judge's prompts and judges; people's own opinions of its answers come after the promotion."
    ]
    if report:
        found.append(f"Thumbs in the table are given by {report['judges']['thumbs_up']}, not by people.")
        if report["expert"] is None:
            found.append("No expert's judgement was held out, so none was asked.")
        if report["comparisons"]["champion_before"]["second_judge_gain"] is None:
            found.append("No second judge reads this language.")
    if not tags.get(BATCHES):
        found.append("It learned from nobody's opinions.")
    return found


def one_line(text: str) -> str:
    """For a cell of a table: what people wrote ends no cell and begins no markup."""
    plain = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#!" else c for c in plain)
