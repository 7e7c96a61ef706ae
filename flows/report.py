"""The report of a flow run, as artifacts in Prefect: how each stage went, the gate's word, figures, answers, curves, links."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.record import Records
from flows.stage import StageResult

_SHOWN_FIGURES = 5


def publish(flow: str, results: Sequence[StageResult], records: Records, parent: str) -> None:
    """Make the artifacts in the running flow: FLOW-report; FLOW-mlflow, a link; of a judged run FLOW-figures and FLOW-answers,
    tables; of each stage that trained STAGE-curves, a picture."""
    from prefect.artifacts import (
        create_image_artifact,
        create_link_artifact,
        create_markdown_artifact,
        create_table_artifact,
    )

    judged = any(result.name == "judge" for result in results)
    text = markdown(flow, results, records, parent)
    create_markdown_artifact(text + (decision(records.root) if judged else ""), key=f"{flow}-report")
    if (url := records.run_url(parent)).startswith("http"):
        create_link_artifact(url, link_text="this flow run in MLflow", key=f"{flow}-mlflow")
    if judged:
        create_table_artifact(figures_table(records.root), key=f"{flow}-figures", description="The judge's figures")
        create_table_artifact(
            answers_table(records.root), key=f"{flow}-answers", description="The same prompts, answered"
        )
    for result in results:
        curves = records.root / "artifacts" / result.name / "curves.csv"
        if result.how == "ran" and curves.exists():
            create_image_artifact(
                picture(curves), key=f"{result.name}-curves", description=f"{result.name} over its steps"
            )


def decision(root: Path) -> str:
    """The gate's word with its reasons, in markdown."""
    gate = _judged(root)["gate"]
    return "\n".join([f"\n## The gate: {gate['decision']}", "", *(f"- {reason}" for reason in gate["reasons"])]) + "\n"


def figures_table(root: Path) -> list[dict[str, Any]]:
    """A row a figure, a column a model."""
    report = _judged(root)
    names = [key for key, value in report["candidate"].items() if isinstance(value, float)]
    roles = ("sft", "champion_before", "candidate")
    return [
        {"figure": name.replace("_", " "), **{role: report[role].get(name) for role in roles}}
        for name in names
        if not name.endswith(("_low", "_high"))
    ]


def answers_table(root: Path) -> list[dict[str, str]]:
    """The judge's samples: a prompt with the answers of base, SFT model and candidate."""
    text = (root / "artifacts/judge/samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def picture(curves: Path) -> str:
    """A curves.csv drawn, as a data: URL (Prefect keeps an address, not bytes)."""
    from flows.record import draw_curves

    drawn = io.BytesIO()
    draw_curves(curves).savefig(drawn, format="png", dpi=70)
    return "data:image/png;base64," + base64.b64encode(drawn.getvalue()).decode()


def _judged(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "artifacts/judge/report.json").read_text(encoding="utf-8"))
    return found


def markdown(flow: str, results: Sequence[StageResult], records: Records, parent: str) -> str:
    """The report's text: a table of the stages with how, seconds, figures and a link to the run that made the outputs."""
    lines = [
        f"# {flow}",
        "",
        f"MLflow: {_link(records, parent, 'this flow run')}",
        "",
        "| stage | how | seconds | figures | record |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for result in results:
        run = _link(records, result.run_id, "run") if result.run_id else "–"
        lines.append(f"| {result.name} | {result.how} | {result.seconds:.1f} | {_figures(result.figures)} | {run} |")
    if not results:
        lines.append("| – | no stage was reached | | | |")
    return "\n".join(lines) + "\n"


def _figures(figures: Mapping[str, Any]) -> str:
    shown = [f"{key} {_number(value)}" for key, value in figures.items() if isinstance(value, int | float)]
    more = f" … {len(shown) - _SHOWN_FIGURES} more" if len(shown) > _SHOWN_FIGURES else ""
    return ", ".join(shown[:_SHOWN_FIGURES]) + more


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _link(records: Records, run_id: str, text: str) -> str:
    url = records.run_url(run_id)
    return f"[{text}]({url})" if url.startswith("http") else f"{text} `{run_id}`"
