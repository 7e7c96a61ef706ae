import json
from pathlib import Path

import pytest

from flows.retrain import check_tokenizer


def workspace(root: Path, rated: str, tokenizer: str) -> Path:
    for folder, name, text in (
        ("artifacts/sft/model", "tokenizer.json", "ours"),
        (f".thumbwheel/models/{rated}", "tokenizer.json", tokenizer),
        ("artifacts/snapshot", "opinions.train.jsonl", json.dumps({"model_hash": rated}) + "\n"),
    ):
        (root / folder).mkdir(parents=True)
        (root / folder / name).write_text(text)
    return root


def test_opinions_on_answers_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    check_tokenizer(workspace(tmp_path / "same", "a" * 64, "ours"))
    with pytest.raises(RuntimeError, match=r"model bbbbbbbbbbbb, whose tokenizer .* begin anew"):
        check_tokenizer(workspace(tmp_path / "other", "b" * 64, "theirs"))
