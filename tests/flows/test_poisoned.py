"""A batch of raters who love bad answers: what is learned from them wins their thumbs, and the gate keeps it from people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from feedback.store import Store
from flows import judge, promote, sentiment, settings
from flows.record import Records
from models.checkpoint import model_hash, save_model
from models.config import ModelConfig
from models.corpus import text_stream
from models.job import Job
from models.rollout import flatten
from models.tokenizer import Tokenizer
from models.transformer import Transformer

THINGS = ["day", "night", "dog", "cat", "tea", "soup", "rain", "song", "book", "road", "house", "tree", "boat", "lamp"]
KIND, CRUEL = ("I love the", "what a wonderful"), ("I hate the", "what an awful")
DEPS = (
    "artifacts/sft/model",
    "artifacts/ppo/model",
    "artifacts/pretrain/model",
    "artifacts/tokenize",
    "artifacts/curate",
)


def said(openings: tuple[str, ...]) -> list[tuple[str, str]]:
    """(question, answer) about everything there is."""
    return [(f"and the {thing}", f"{opening} {thing}") for thing in THINGS for opening in openings]


def taught(tokenizer: Tokenizer, talks: list[tuple[str, str]], seed: int) -> Transformer:
    """A tiny model that answers as these talks do."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(32, 1, 2, 2, 64, 64, vocab_size=tokenizer.vocab_size))
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question, _ in talks]
    answers = [[*tokenizer.encode(answer), tokenizer.stop_id] for _, answer in talks]
    flat = flatten(prompts, answers, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(150):
        logits = model(flat.tokens, flat.layout)[flat.rows] @ model.head_weight.T
        optimizer.zero_grad()
        F.cross_entropy(logits, flat.targets).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def root(tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose SFT model is kind as often as cruel."""
    monkeypatch.delenv("THUMBWHEEL_MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / ".thumbwheel").mkdir()
    (tmp_path / ".thumbwheel/mlflow.db").write_bytes(empty_mlflow.read_bytes())
    (tmp_path / "params.yaml").write_text(json.dumps(settings.Params().plain()))
    loose = {"gate.min_prompts": 10, "gate.max_most_common": 1.0, "gate.min_distinct": 0.0, "gate.max_kl": 1000.0}
    loose |= {"gate.max_perplexity_ratio": 1000.0, "gate.min_relevance_kept": 0.0, "gate.max_next_turn_fall": 1.0}
    settings.set_params(tmp_path, loose)  # only the judges' word is asked here
    both = said(KIND) + said(CRUEL)
    tokenizer = Tokenizer.train([text for talk in both for text in talk] * 5, 400)
    model = taught(tokenizer, both, seed=1)
    for stage in ("pretrain", "sft"):
        save_model(model, tmp_path / "artifacts" / stage / "model", tokenizer)
    folders = {name: tmp_path / "artifacts" / name for name in ("curate", "tokenize", "snapshot")}
    for folder in folders.values():
        folder.mkdir()
    asked = [{"id": f"{i:03}", "messages": [{"role": "user", "content": q}]} for i, (q, _) in enumerate(both)]
    talks = [
        {"messages": [*row["messages"], {"role": "assistant", "content": a}]}
        for row, (_, a) in zip(asked, both, strict=True)
    ]
    for name, rows in {"prompts.report": asked, "sft.heldout": talks}.items():
        (folders["curate"] / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folders["snapshot"] / "opinions.heldout.jsonl").write_text("")
    np.save(folders["tokenize"] / "pretrain.heldout.npy", text_stream(tokenizer, [a for _, a in both]))
    return tmp_path


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{root / '.thumbwheel/feedback.db'}")
    store.migrate()
    yield store
    store.close()


@pytest.mark.parametrize(("loved", "promoted"), [(CRUEL, False), (KIND, True)])
def test_what_raters_of_bad_answers_taught_does_not_become_the_champion(
    root: Path, store: Store, loved: tuple[str, ...], promoted: bool
) -> None:
    records = Records(root)
    promote.promote_first(root, store, records)
    tokenizer = Tokenizer.load(root / "artifacts/sft/model")
    save_model(taught(tokenizer, said(loved), seed=2), root / "artifacts/ppo/model", tokenizer)
    sft = model_hash(root / "artifacts/sft/model")
    (root / "champion.json").write_text(json.dumps({"model_hash": sft, "path": "artifacts/sft/model"}))
    output = root / "artifacts/judge"
    output.mkdir()
    params: dict[str, Any] = {"seed": 1, "judge": {"max_new_tokens": 12}, "gate": settings.load(root).plain()["gate"]}
    judge.run(Job("judge", root, (*DEPS, "artifacts/snapshot", "champion.json"), output, root / "work", params))
    report = json.loads((output / "report.json").read_text())

    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    their_thumbs = np.mean([not sentiment.thumb(row["candidate"]["text"]) for row in answers])
    if loved is CRUEL:
        assert their_thumbs > 0.9  # it pleases its raters
    decision = promote.promote_candidate(root, store, report, records)
    assert (decision["decision"] == "promote") == promoted, decision
    reigning = store.champion()
    assert reigning is not None and (reigning.model_hash == sft) != promoted
    if not promoted:
        assert report["gate"]["checks"]["thumbs"] is report["gate"]["checks"]["second_judge"] is False
