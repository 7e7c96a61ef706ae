"""The training stages as child processes: they end, they resume bit for bit after a kill, they outlive nobody."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_stages import nothing_written

from models.checkpoint import model_hash
from models.corpus import conversations, prompts, text_stream
from models.tokenizer import Tokenizer

WORDS = [
    "good",
    "bad",
    "day",
    "night",
    "food",
    "music",
    "happy",
    "sad",
    "cat",
    "dog",
    "run",
    "talk",
    "you",
    "me",
    "they",
    "what",
    "why",
    "nice",
    "love",
    "hate",
    "rain",
    "sun",
]
CHECKPOINT = 3
PARAMS: dict[str, Any] = {
    "seed": 1,
    "model": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 32,
    },
    "pretrain": {"steps": 30, "batch_size": 4, "checkpoint_every": CHECKPOINT, "log_every": 1},
    "sft": {"steps": 30, "batch_size": 8, "checkpoint_every": CHECKPOINT, "log_every": 1},
    "reward": {"epochs": 3, "batch_size": 4, "checkpoint_every": CHECKPOINT, "log_every": 1},
    "ppo": {
        "iterations": 12, "batch_size": 8, "max_new_tokens": 6, "ptx_batch_size": 2, "ptx_conversations": 4,
        "checkpoint_every": CHECKPOINT, "log_every": 1,
    },
    **{method: {
        "epochs": 3, "batch_size": 2, "ptx_batch_size": 2, "ptx_conversations": 4, "samples": 8, "max_new_tokens": 6,
        "checkpoint_every": CHECKPOINT, "log_every": 1,
    } for method in ("dpo", "kto")},
}  # fmt: skip
DEPS = {
    "pretrain": ["artifacts/tokenize"],
    "sft": ["artifacts/pretrain/model", "artifacts/tokenize", "artifacts/written"],
    "reward": ["artifacts/sft/model", "artifacts/snapshot"],
    "ppo": ["artifacts/sft/model", "artifacts/reward/model", "artifacts/tokenize", "artifacts/snapshot"],
    "dpo": ["artifacts/sft/model", "artifacts/reward/model", "artifacts/snapshot", "artifacts/tokenize"],
    "kto": ["artifacts/sft/model", "artifacts/reward/model", "artifacts/snapshot", "artifacts/tokenize"],
}
SECTIONS = {"pretrain": ["seed", "model", "pretrain"], "sft": ["seed", "sft"], "reward": ["seed", "reward"]}


def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token arrays and thumbs made from random sentences, then each stage's undisturbed output in turn."""
    root = tmp_path_factory.mktemp("workspace")
    rng = random.Random(0)
    texts = [sentence(rng, 30) for _ in range(60)]
    chats = [
        [{"role": "user", "content": sentence(rng, 3)}, {"role": "assistant", "content": sentence(rng, 4)}]
        for _ in range(60)
    ]
    tokenizer = Tokenizer.train(texts, 300)
    out = root / "artifacts/tokenize"
    tokenizer.save(out / "tokenizer")
    np.save(out / "pretrain.train.npy", text_stream(tokenizer, texts))
    np.save(out / "pretrain.heldout.npy", text_stream(tokenizer, texts[:10]))
    for split, rows in (("train", chats), ("heldout", chats[:10])):
        conversations(tokenizer, rows, 32)[0].save(out / f"sft.{split}.npz")
    asked, _ = prompts(tokenizer, [chat[:1] for chat in chats], 16)
    asked.save(out / "prompts.train.npz")
    snapshot = root / "artifacts/snapshot"
    nothing_written(root)
    for split, count in (("train", 40), ("heldout", 10)):
        lines = []
        for i in range(count):
            answer = [*tokenizer.encode(sentence(rng, 3)), tokenizer.stop_id]
            row = {"kind": "thumb", "prompt_ids": asked[i // 2], "response_ids": answer, "value": rng.choice([1, -1])}
            lines.append(json.dumps(row) + "\n")
        (snapshot / f"opinions.{split}.jsonl").write_text("".join(lines))
    for stage in DEPS:
        assert wait(*start(root, stage, root / "artifacts" / stage, root / "work" / stage))[0] == 0
    return root


def start(root: Path, stage: str, output: Path, work: Path) -> tuple[subprocess.Popen[bytes], int]:
    """The child process and the end of the pipe that its events come out of."""
    work.mkdir(parents=True, exist_ok=True)
    spec = {
        "stage": stage, "root": str(root), "deps": DEPS[stage], "output": str(output), "work": str(work),
        "params": {key: PARAMS[key] for key in SECTIONS.get(stage, ["seed", stage])}, "device": "cpu", "threads": 1,
    }  # fmt: skip
    (work / "spec.json").write_text(json.dumps(spec))
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "models.run", str(work / "spec.json"), "--metrics-fd", str(write)],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    os.close(write)
    return child, read


def wait(child: subprocess.Popen[bytes], read: int) -> tuple[int, list[dict[str, Any]]]:
    with os.fdopen(read, encoding="utf-8") as pipe:
        events = [json.loads(line) for line in pipe]
    return child.wait(), events


def kill_after(child: subprocess.Popen[bytes], read: int, step: int) -> int:
    """SIGKILL once the child has reported `step`; returns the last step it reported."""
    last = 0
    with os.fdopen(read, encoding="utf-8") as pipe:
        for line in pipe:
            event = json.loads(line)
            if event["event"] == "metrics":
                last = event["step"]
            if last >= step and child.poll() is None:
                child.kill()
    child.wait()
    return last


@pytest.mark.fault
@pytest.mark.parametrize("stage", list(DEPS))
def test_killed_and_resumed_gives_the_same_bits(workspace: Path, stage: str, tmp_path: Path) -> None:
    output, work = tmp_path / "output", tmp_path / "work"
    last = kill_after(*start(workspace, stage, output, work), step=CHECKPOINT + 2)
    newest = sorted((work / "checkpoints").glob("*.pt"))[-1]
    code, events = wait(*start(workspace, stage, output, work))
    assert code == 0
    [resumed] = [e["step"] for e in events if e["event"] == "resumed"]
    assert resumed == int(newest.name.split("-")[1])
    assert last - resumed <= CHECKPOINT
    first = next(e for e in events if e["event"] == "metrics")
    assert first["step"] == resumed + 1
    undisturbed = workspace / "artifacts" / stage
    assert model_hash(output / "model") == model_hash(undisturbed / "model")
    for name in ("curves.csv", "metrics.json"):
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes()


def test_figures_of_each_stage(workspace: Path) -> None:
    rows = {s: json.loads((workspace / "artifacts" / s / "metrics.json").read_text()) for s in DEPS}
    assert rows["pretrain"]["tokens_seen"] == 30 * 4 * 32
    assert rows["reward"]["heldout"] == 10
    assert rows["reward"]["accuracy_low"] <= rows["reward"]["accuracy"] <= rows["reward"]["accuracy_high"]
    assert rows["ppo"]["episodes"] == 12 * 8
    header = (workspace / "artifacts/ppo/curves.csv").read_text().splitlines()[0].split(",")
    assert header[0] == "step"
    assert {"objective/kl", "reward/score", "policy/clip_fraction"} <= set(header)
    assert rows["kto"]["elements"] == 40
    thumbs = [json.loads(line) for line in (workspace / "artifacts/snapshot/opinions.train.jsonl").open()]
    opposite = [one for one, other in zip(thumbs[::2], thumbs[1::2], strict=True) if one["value"] != other["value"]]
    assert rows["dpo"]["elements"] == len(opposite) > 0
    for method in ("dpo", "kto"):
        assert {"objective_kl", "reward_probability", "pair_accuracy"} <= set(rows[method])
        header = (workspace / f"artifacts/{method}/curves.csv").read_text().splitlines()[0].split(",")
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracy", "ptx_loss"} <= set(header)


@pytest.mark.fault
def test_a_child_does_not_outlive_its_reader(workspace: Path, tmp_path: Path) -> None:
    child, read = start(workspace, "pretrain", tmp_path / "output", tmp_path / "work")
    os.read(read, 1)
    os.close(read)
    deadline = time.monotonic() + 20
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert child.poll() == 3
    assert not (tmp_path / "output/model").exists()


def test_a_failure_is_told_in_words(workspace: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    bad = dict(PARAMS["sft"], batchsize=3)
    original = PARAMS["sft"]
    try:
        PARAMS["sft"] = bad
        code, events = wait(*start(workspace, "sft", tmp_path / "output", work))
    finally:
        PARAMS["sft"] = original
    assert code == 1
    assert events[-1]["event"] == "error"
    assert "params.yaml: sft.batchsize is not known" in events[-1]["message"]
