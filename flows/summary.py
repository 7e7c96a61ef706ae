"""What the main job shows a person: first what is left to do, in the end the judge's table, answers, where to look."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows import servers
from flows.values import read_document

BEFORE = ("curate", "validate", "tokenize", "pretrain", "written", "sft", "snapshot", "reward")
SHOWN_PROMPTS = 6
MODELS = (("sft", "SFT"), ("champion_before", "champion before"), ("candidate", "candidate"))


def left_to_do(root: Path) -> str:
    """One sentence from what stands in artifacts/; whether it is still current is for DVC to say, stage by stage."""
    order = (*BEFORE, method(root), "judge")
    missing = [stage for stage in order if not (root / "artifacts" / stage).exists()]
    if len(missing) == len(order):
        return "First turn of the wheel: every stage has to run."
    if missing:
        return f"Going on: {', '.join(missing)} have not been made yet; the others are looked at."
    return "Every stage has been made before: what did not change is not run again."


def method(root: Path) -> str:
    """The stage that makes the candidate (params.yaml: align.method, read without the training code's options)."""
    return str(read_document(root / "params.yaml").get("align", {}).get("method", "ppo"))


def report_path(root: Path) -> Path:
    """The judge's report."""
    return root / "artifacts" / "judge" / "report.json"


def show(root: Path, console: Console) -> None:
    """The judge's table, the gate's decision with its reasons, and the answers side by side."""
    if not report_path(root).exists():
        console.print("Nothing was judged yet: nobody has rated an answer. `make up`, chat, vote.", highlight=False)
        return
    report = json.loads(report_path(root).read_text(encoding="utf-8"))
    console.print()
    console.print(judge_table(report))
    gate = report["gate"]
    console.print(f"gate: {gate['decision']}", style="bold green" if gate["decision"] == "promote" else "bold yellow")
    for reason in gate["reasons"]:
        console.print(f"  - {reason}", markup=False, highlight=False)
    samples = root / "artifacts" / "judge" / "samples.jsonl"
    answers = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()[:SHOWN_PROMPTS]]
    console.print()
    console.print(answers_table(answers, report["method"].upper()))


def judge_table(report: Mapping[str, Any]) -> Table:
    """A row a figure, a column a model: sft, champion_before and candidate of the report."""
    table = Table(title=f"The judge, on {report['prompts']} prompts nobody trained on (seed {report['seed']})")
    table.add_column("figure")
    for _, title in MODELS:
        named = f"{title} ({report['method'].upper()})" if title == "candidate" else title
        table.add_column(named, justify="right")
    names = [key for key in report["candidate"] if _shown(report["candidate"], key)]
    for name in names:
        table.add_row(name.replace("_", " "), *(_cell(report.get(model) or {}, name) for model, _ in MODELS))
    return table


def _shown(figures: Mapping[str, Any], key: str) -> bool:
    return isinstance(figures[key], (int, float)) and not key.endswith(("_low", "_high"))


def _cell(figures: Mapping[str, Any], name: str) -> str:
    value = figures.get(name)
    if not isinstance(value, (int, float)):
        return "-"
    low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
    interval = f" [{low:.3f}, {high:.3f}]" if isinstance(low, float) and isinstance(high, float) else ""
    return (f"{value:.3f}" if isinstance(value, float) else str(value)) + interval


def answers_table(answers: list[dict[str, str]], method: str) -> Table:
    """The same prompts, answered by the base, the SFT model and the candidate, which `method` made."""
    table = Table(title="The same prompts, before and after", show_lines=True)
    for title in ("prompt", "base", "SFT", method):
        table.add_column(title, overflow="fold", ratio=1)
    for row in answers:
        table.add_row(*(Text(row[name]) for name in ("prompt", "base", "sft", "candidate")))
    return table


def where_to_look(root: Path, kept: bool, console: Console) -> None:
    """Files of this workspace and, when servers stay up, their addresses; else how to start them."""
    found = [
        ("the judge's report", report_path(root)),
        ("the data gate's page", root / "artifacts" / "validate" / "report.html"),
        ("the candidate", root / "artifacts" / method(root) / "model"),
        ("logs", servers.state_folder(root) / "logs"),
    ]
    console.print("\nWhere to look", style="bold")
    for what, path in found:
        if path.exists():
            console.print(f"  {what}: {path.relative_to(root)}", highlight=False)
    if kept:
        addresses(root, console)
    else:
        console.print("  make up    starts the chat page, Prefect's and MLflow's pages, and prints their addresses")


def addresses(root: Path, console: Console) -> None:
    """The addresses of the servers that run."""
    titles = {"service": "chat page", "prefect": "Prefect (flows)", "mlflow": "MLflow (runs and models)"}
    running = servers.read(root)
    for name, title in titles.items():
        if name in running and running[name].alive:
            console.print(f"  {title}: {running[name].url}", highlight=False)
