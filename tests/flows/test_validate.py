"""The data gate: broken data files stop before training with file, line and remedy; planted faults are each found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flows import curate, validate
from flows.validate import GateError, ValidateOptions
from models.job import Job

TRAIN, HELDOUT, TUNE = "g1", "g9", "g12"  # see test_curate
FEW = {"min_train_rows": 1, "min_heldout_rows": 1}


def pair(ask: str, answer: str = "yes") -> list[dict[str, str]]:
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]


def workspace(root: Path) -> Path:
    """A workspace whose data/ has one row of each kind on each side, all in order."""
    for kind, row in (
        ("pretrain", {"text": "{} text"}),
        ("sft", {"messages": pair("{} ask")}),
        ("prompts", {"prompt": "{} go"}),
    ):
        (root / "data" / kind).mkdir(parents=True)
        lines = (json.dumps({**row, "group": g}).replace("{}", f"{g} {kind}") for g in (TRAIN, HELDOUT, TUNE))
        (root / "data" / kind / "good.jsonl").write_text("\n".join(lines) + "\n")
    return root


def job(root: Path, stage: str, dep: str, section: dict[str, Any]) -> Job:
    output = root / "artifacts" / stage
    output.mkdir(parents=True, exist_ok=True)
    return Job(stage, root, (dep,), output, root / "work", {stage: section})


def gate(root: Path, **options: int) -> dict[str, Any]:
    """Both stages, as the flow runs them. Returns what validate returns; raises what it raises."""
    curate.run(job(root, "curate", "data", {}))
    return validate.run(job(root, "validate", "artifacts/curate", {**FEW, **options}))


def rewrite(root: Path, name: str, change: Any) -> None:
    """Change the rows of a curated file behind curate's back: `change` maps a list of rows to another."""
    path = root / "artifacts" / "curate" / f"{name}.jsonl"
    rows = change([json.loads(line) for line in path.read_text("utf-8").splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def failed(root: Path) -> dict[str, dict[str, Any]]:
    """The failed expectations of the report, by suite and what they check."""
    report = json.loads((root / "artifacts/validate/report.json").read_text("utf-8"))
    return {f"{s['name']}: {e['checks']}": e for s in report["suites"] for e in s["expectations"] if not e["success"]}


def test_good_data_passes_and_the_report_is_the_same_each_time(tmp_path: Path) -> None:
    workspace(tmp_path)
    figures = gate(tmp_path)
    output = tmp_path / "artifacts/validate"
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    assert sorted(first) == ["report.html", "report.json"]
    assert (figures["rows"], figures["rejected"], figures["checks"]) == (7, 0, 34)
    gate(tmp_path)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == first
    assert (tmp_path / validate.PAGE).read_bytes() == first["report.html"]
    assert not re.search(rb"https?://|<script|src=", first["report.html"])  # readable offline


BROKEN = [
    ("missing field", "sft", b'{"text": "no messages"}\n', 'field "messages" is missing', 1),
    ("bad JSON", "pretrain", b'{"text": "fine", "group": "g1"}\n{"text": "half', "bad JSON", 2),
    ("wrong encoding", "prompts", '{"prompt": "你好"}\n'.encode("gb18030"), "not UTF-8 (byte 13 of the line)", 1),
    ("empty file", "sft", b"", "empty file", 0),
    (
        "assistant first",
        "sft",
        json.dumps({"messages": [{"role": "assistant", "content": "Hi"}, *pair("Hello")]}).encode() + b"\n",
        "an assistant turn comes first",
        1,
    ),
]


@pytest.mark.parametrize(("kind", "content", "reason", "line"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_broken_data_file_stops_with_file_line_and_remedy(
    tmp_path: Path, kind: str, content: bytes, reason: str, line: int
) -> None:
    workspace(tmp_path)
    (tmp_path / "data" / kind / "mine.jsonl").write_bytes(content)
    with pytest.raises(GateError) as stopped:
        gate(tmp_path)
    place = f"data/{kind}/mine.jsonl" + (f" line {line}" if line else "")
    said = next(text for text in str(stopped.value).splitlines() if place in text)
    assert reason in said
    assert re.search(r"Remedy: \w+ .+\.", said)
    assert "validate.max_rejected allows 0" in str(stopped.value)
    page = (tmp_path / validate.PAGE).read_text("utf-8")  # readable although the stage failed
    assert f">data/{kind}/mine.jsonl</code>" in page
    assert "The data gate stopped before any training" in page


def test_max_rejected_puts_up_with_as_many_rows_and_no_more(tmp_path: Path) -> None:
    workspace(tmp_path)
    (tmp_path / "data/sft/mine.jsonl").write_bytes(b"{}\n" * 7)
    assert gate(tmp_path, max_rejected=7)["rejected"] == 7
    with pytest.raises(GateError, match=r"7 unreadable rows .*allows 6.*\n(.*line [1-5]: .*\n){5}  … and 2 more"):
        gate(tmp_path, max_rejected=6)


def test_a_missing_kind_and_too_few_rows_are_told(tmp_path: Path) -> None:
    workspace(tmp_path)
    (tmp_path / "data/prompts/good.jsonl").unlink()
    with pytest.raises(GateError, match=r"data/prompts: no file in this folder\. Remedy: put files there") as stopped:
        gate(tmp_path)
    assert "Not met in files: every file has enough rows" in str(stopped.value)
    assert "artifacts/curate/prompts.report.jsonl" in str(stopped.value)


def test_planted_faults_are_each_found_by_the_suite_that_looks_for_them(tmp_path: Path) -> None:
    workspace(tmp_path)
    gate(tmp_path)
    rewrite(tmp_path, "pretrain.train", lambda rows: [*rows, rows[0], {**rows[0], "id": "xyz"}])
    rewrite(tmp_path, "pretrain.heldout", lambda rows: [{**rows[0], "text": "G1 pretrain, text!"}])
    user, assistant = pair("u", "a")
    wrong_roles = {"id": "0" * 16, "messages": [user, assistant, assistant], "source": None}
    rewrite(tmp_path, "sft.train", lambda rows: [*rows, wrong_roles])
    replaced = {"id": "1" * 16, "messages": pair("caf\ufffd", "x" * 4001), "source": "mine"}
    rewrite(tmp_path, "sft.heldout", lambda rows: [*rows, replaced])
    tuned = {"id": "2" * 16, "messages": [{"role": "user", "content": "G12 PROMPTS GO"}], "source": "mine", "extra": 1}
    rewrite(tmp_path, "prompts.report", lambda rows: [*rows, tuned])
    with pytest.raises(GateError):
        validate.run(job(tmp_path, "validate", "artifacts/curate", FEW))
    found = failed(tmp_path)
    places = {name: [(row["file"], row["line"]) for row in result["examples"]] for name, result in found.items()}
    assert places == {
        "pretrain: no duplicates in a file": [("pretrain.train.jsonl", 1), ("pretrain.train.jsonl", 2)],
        "pretrain: ids are 16 hexadecimal digits": [("pretrain.train.jsonl", 3)],
        "pretrain: no held-out row whose prompt or text occurs in training": [("pretrain.heldout.jsonl", 1)],
        "sft: no row without a source": [("sft.train.jsonl", 2)],
        "sft: roles alternate, the user opens, the assistant has the last word": [("sft.train.jsonl", 2)],
        "sft: each message has at most 4000 characters": [("sft.heldout.jsonl", 2)],
        "sft: encoding: no replacement and no control characters": [("sft.heldout.jsonl", 2)],
        "prompts: schema: every row has id, source and messages": [("prompts.report.jsonl", 2)],
        "prompts: no held-out row whose prompt or text occurs in training": [("prompts.report.jsonl", 2)],
    }


def test_text_from_data_cannot_write_into_the_page(tmp_path: Path) -> None:
    workspace(tmp_path)
    (tmp_path / "data/sft/mine.jsonl").write_text("<script>alert(1)</script>\n")
    with pytest.raises(GateError):
        gate(tmp_path)
    page = (tmp_path / validate.PAGE).read_text("utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="min_chars is 9"):
        ValidateOptions(min_chars=9, max_chars_message=8)
