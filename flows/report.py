"""The report of a flow run, as a markdown artifact in Prefect: how each stage went, its figures, where to look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flows.record import Records
from flows.stage import StageResult

_SHOWN_FIGURES = 5


def publish(flow: str, results: Sequence[StageResult], records: Records, parent: str) -> None:
    """Make the artifact (key: the flow's name + "-report") in the running flow."""
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact(markdown(flow, results, records, parent), key=f"{flow}-report")


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
