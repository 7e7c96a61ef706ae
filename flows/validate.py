"""Stage validate, the data gate: nothing is trained on data that does not meet the expectations.

Passes or raises GateError; either way the report page tells what was checked and which rows failed, offline.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.curate import FILES, KINDS, Row, key, keys_of
from models.job import Job

if TYPE_CHECKING:
    import pandas as pd

NAMED = 5  # rows that the error message names; the page lists more
LISTED = 200  # quarantined rows that the page lists
PAGE = Path(".thumbwheel/reports/validate.html")


@dataclass(frozen=True)
class ValidateOptions:
    """Section `validate` of params.yaml.

    max_rejected: unreadable rows that are put up with; min_train_rows, min_heldout_rows: rows that each file of the
    training side, and of the held-out side, needs; min_chars, max_chars_text, max_chars_message: lengths in characters
    of a pretraining text and of a message.
    """

    max_rejected: int = 0
    min_train_rows: int = 100
    min_heldout_rows: int = 10
    min_chars: int = 1
    max_chars_text: int = 20_000
    max_chars_message: int = 4_000

    def __post_init__(self) -> None:
        for name in ("max_rejected", "min_train_rows", "min_heldout_rows", "min_chars"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")
        if self.min_chars > min(self.max_chars_text, self.max_chars_message):
            raise ValueError(f"min_chars is {self.min_chars}: it must not be above max_chars_text or max_chars_message")


class GateError(ValueError):
    """The data does not meet the expectations; the message names the first rows by file and line, and the remedy."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that curate wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def frame_of(kind: str, files: dict[str, list[Row]], seen: set[bytes], tuned: set[bytes]) -> pd.DataFrame:
    """The table that the expectations of `kind` speak about: one row for each row of its files (see flows.expectations).

    seen: the keys that training sees; tuned: those of prompts.tune, which prompts.report must not repeat.
    """
    import pandas as pd

    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for side, name in FILES[kind].items():
        known = seen | tuned if name == "prompts.report" else seen
        for line, row in enumerate(files[name], 1):
            messages = row.get("messages") or []
            texts = [row.get("text")] if kind == "pretrain" else [m.get("content") for m in messages]
            lengths = [len(text or "") for text in texts] or [0]
            described = (
                f"{name}.jsonl",
                line,
                " ".join(sorted(row)),
                row.get("id"),
                row.get("source"),
                None if None in texts or not texts else "\n".join(map(str, texts)),
                min(lengths),
                max(lengths),
                " ".join(str(m.get("role")) for m in messages),
                side != "train" and not known.isdisjoint(keys_of(row)),
            )
            for column, value in zip(COLUMNS, described, strict=True):
                columns[column].append(value)
    return pd.DataFrame(columns)


COLUMNS = ("file", "line", "fields", "id", "source", "content", "shortest", "longest", "roles", "seen_in_training")


def frames(files: dict[str, list[Row]]) -> dict[str, pd.DataFrame]:
    """The table of each kind. What training sees is worked out anew here, from the files and not from curate's memory."""
    texts = {key(row["text"]) for row in files["pretrain.train"]}
    prompts = {key(line) for row in files["pretrain.train"] for line in row["text"].split("\n")}
    for name in ("sft.train", "prompts.train"):
        prompts.update(k for row in files[name] for k in keys_of(row))
    tuned = {k for row in files["prompts.tune"] for k in keys_of(row)}
    return {kind: frame_of(kind, files, texts if kind == "pretrain" else prompts, tuned) for kind in KINDS}


def file_table(files: dict[str, list[Row]], options: ValidateOptions) -> pd.DataFrame:
    """One row for each curated file: its number of rows and the minimum asked for."""
    import pandas as pd

    minimum = {"train": options.min_train_rows, "heldout": options.min_heldout_rows, "tune": 0}
    table = [
        {"file": f"{name}.jsonl", "line": 0, "rows": len(files[name]), "minimum": minimum[side]}
        for kind in KINDS
        for side, name in FILES[kind].items()
    ]
    return pd.DataFrame(table)


def examine(folder: Path, options: ValidateOptions) -> dict[str, Any]:
    """Check everything in artifacts/curate against the suites. Returns the report, the same for the same bytes."""
    import pandas as pd

    from flows import expectations

    files = {name: read_rows(folder / f"{name}.jsonl") for kind in KINDS for name in FILES[kind].values()}
    quarantine = read_rows(folder / "quarantine.jsonl")
    rejected = pd.DataFrame(quarantine, columns=["file", "line", "reason", "remedy", "text"])
    suites = [
        expectations.check(rejected, expectations.quarantine_suite(options.max_rejected)),
        expectations.check(file_table(files, options), expectations.files_suite()),
    ]
    for kind, frame in frames(files).items():
        longest = options.max_chars_text if kind == "pretrain" else options.max_chars_message
        suites.append(expectations.check(frame, expectations.table_suite(kind, options.min_chars, longest)))
    return {
        "success": all(suite["success"] for suite in suites),
        "max_rejected": options.max_rejected,
        "rejected": len(quarantine),
        "quarantine": quarantine[:LISTED],
        "files": {name: len(rows) for name, rows in files.items()},
        "curate": json.loads((folder / "summary.json").read_text("utf-8"))["steps"],
        "suites": suites,
    }


def complaint(report: dict[str, Any]) -> str:
    """What the error says: what failed, the first rows by file and line, what to do, where the page is."""
    lines = ["The data gate stopped the flow before any training."]
    if report["rejected"] > report["max_rejected"]:
        allowed = report["max_rejected"]
        rows = "row" if report["rejected"] == 1 else "rows"
        lines.append(f"{report['rejected']} unreadable {rows} (params.yaml: validate.max_rejected allows {allowed}):")
        lines += [f"  {_place(row)}: {row['reason']}. Remedy: {row['remedy']}." for row in report["quarantine"][:NAMED]]
        if report["rejected"] > NAMED:
            lines.append(f"  … and {report['rejected'] - NAMED} more")
    for suite in report["suites"]:
        for result in suite["expectations"]:
            if result["success"] or suite["name"] == "quarantine":
                continue
            lines.append(f"Not met in {suite['name']}: {result['checks']}. Remedy: {result['remedy']}")
            shown = result["examples"][:NAMED]
            lines += [f"  artifacts/curate/{_place(row)}: {row['value']}" for row in shown]
    lines.append(f"The whole report: {PAGE.as_posix()}")
    return "\n".join(lines)


def _place(row: Row) -> str:
    """A row's file and line; line 0 is the file as a whole."""
    return f"{row['file']} line {row['line']}" if row["line"] else str(row["file"])


def run(job: Job) -> dict[str, Any]:
    """Check artifacts/curate/; write report.json and report.html, the page also to .thumbwheel/reports/.

    Returns the number of checks and rows. Raises GateError when an expectation is not met.
    """
    from flows.report_page import render

    started = time.monotonic()
    report = examine(job.input("artifacts/curate"), job.options("validate", ValidateOptions))
    (job.output / "report.json").write_text(
        json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8"
    )
    page = render(report)
    # the output of a failed stage is thrown away; this copy is what the user is pointed to
    for path in (job.output / "report.html", job.root / PAGE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, "utf-8")
    if not report["success"]:
        raise GateError(complaint(report))
    checks = sum(len(suite["expectations"]) for suite in report["suites"])
    rows = sum(report["files"].values())
    job.log(1, 1, {"checks": checks, "rows": rows, "rejected": report["rejected"]})
    seconds = round(time.monotonic() - started, 2)
    return {"checks": checks, "rows": rows, "rejected": report["rejected"], "seconds": seconds}
