"""The judge, on real tiny models: figures against values worked out another way, and the whole stage body."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows import judge, retention
from flows.contender import Contender, Prompt, fitting, stream_seed
from flows.judge import Judged, JudgeOptions
from models.checkpoint import model_hash, save_model
from models.config import ModelConfig
from models.corpus import text_stream
from models.job import Job
from models.rollout import generate
from models.tokenizer import Tokenizer
from models.transformer import Transformer

SPEECH = "I love the good day and you hate a bad night so what do we say yes no maybe great awful fine"
WORDS = SPEECH.split()
DEPS = (
    "artifacts/sft/model",
    "artifacts/ppo/model",
    "artifacts/pretrain/model",
    "artifacts/tokenize",
    "artifacts/curate",
    "artifacts/snapshot",
    "champion.json",
)
OPTIONS: dict[str, Any] = {"prompts": 12, "max_new_tokens": 8, "width": 4, "bootstrap": 200, "samples": 3, "choices": 9}
OPTIONS["perplexity_tokens"] = 300


def sentences(count: int) -> list[str]:
    draw = np.random.default_rng(3)
    return [" ".join(draw.choice(WORDS, size=4)) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(sentences(300), 300)


def tiny(tokenizer: Tokenizer, seed: int | None) -> Transformer:
    """A random model; with seed None, one that gives every token the same probability."""
    torch.manual_seed(seed or 0)
    config = ModelConfig(16, 1, 2, 2, 32, 64, vocab_size=tokenizer.vocab_size)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
        if seed is None:
            model.embedding.weight.zero_()
    return model.eval()


@pytest.fixture(scope="module")
def folders(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, seed in {"pretrain": 1, "sft": 2, "ppo": 3, "uniform": None}.items():
        save_model(tiny(tokenizer, seed), root / name, tokenizer)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture
def workspace(tokenizer: Tokenizer, folders: dict[str, Path], tmp_path: Path) -> Path:
    for stage in ("pretrain", "sft", "ppo"):
        shutil.copytree(folders[stage], tmp_path / "artifacts" / stage / "model")
    curate, tokenize = tmp_path / "artifacts/curate", tmp_path / "artifacts/tokenize"
    curate.mkdir()
    tokenize.mkdir()
    rows = [{"id": f"{i:016x}", "messages": [{"role": "user", "content": t}]} for i, t in enumerate(sentences(30))]
    (curate / "prompts.report.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    talks = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairwise(sentences(16))]
    (curate / "sft.heldout.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (tmp_path / "artifacts/snapshot").mkdir()
    (tmp_path / "artifacts/snapshot/opinions.heldout.jsonl").write_text("")
    np.save(tokenize / "pretrain.heldout.npy", text_stream(tokenizer, sentences(60)))
    name_champion(tmp_path, "artifacts/sft/model")
    return tmp_path


def name_champion(root: Path, path: str) -> None:
    content = {"model_hash": model_hash(root / path), "path": path}
    (root / "champion.json").write_text(json.dumps(content))


def run(
    root: Path, name: str = "out", gate: dict[str, Any] | None = None, **options: Any
) -> tuple[dict[str, Any], Path]:
    output = root / name
    output.mkdir()
    params = {"seed": 7, "judge": OPTIONS | options, "gate": gate or {}}
    result = judge.run(Job("judge", root, DEPS, output, root / "work", params))
    report = json.loads((output / "report.json").read_text())
    assert result["prompts"] == report["prompts"]
    return report, output


def test_the_whole_stage(workspace: Path) -> None:
    report, output = run(workspace)
    assert set(report) == {
        *(
            "method",
            "seed",
            "prompts",
            "language",
            "judges",
            "sft",
            "champion_before",
            "candidate",
            "comparisons",
            "pairwise",
            "expert",
            "gate",
        )
    }
    assert (report["seed"], report["prompts"]) == (7, 12)
    assert report["sft"] == report["champion_before"]  # the SFT model is the first champion
    assert report["sft"]["model_hash"] != report["candidate"]["model_hash"]
    assert report["sft"]["kl_per_answer"] == pytest.approx(0.0, abs=1e-4)
    assert report["candidate"]["kl_per_answer"] > 0
    assert report["gate"]["decision"] == "keep"
    assert any("12 prompts" in reason for reason in report["gate"]["reasons"])

    assert report["expert"] is None and set(report["pairwise"]) == {"words"}
    words = report["pairwise"]["words"]
    assert words["win_rate"] == report["comparisons"]["champion_before"]["win_rate"]
    assert 0 <= report["candidate"]["next_turn_accuracy"] <= 1

    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in answers] == [f"{i:016x}" for i in range(12)]
    rate = sum(row["candidate"]["thumb"] for row in answers) / 12
    assert report["candidate"]["thumbs_up_rate"] == pytest.approx(rate, abs=1e-6)
    kl = sum(row["candidate"]["kl"] for row in answers) / 12
    assert report["candidate"]["kl_per_answer"] == pytest.approx(kl, abs=1e-5)
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    assert [row["candidate"] for row in samples] == [row["candidate"]["text"] for row in answers[:3]]
    assert (output / "figures.csv").read_text().startswith("model,figure,value,low,high\nsft,thumbs_up_rate,")


def test_equal_inputs_give_equal_bytes(workspace: Path) -> None:
    _, first = run(workspace, "first")
    _, second = run(workspace, "second")
    assert sorted(p.name for p in first.iterdir()) == ["answers.jsonl", "figures.csv", "report.json", "samples.jsonl"]
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


def test_a_candidate_equal_to_the_champion_gains_nothing(workspace: Path, folders: dict[str, Path]) -> None:
    shutil.rmtree(workspace / "artifacts/ppo/model")
    shutil.copytree(folders["sft"], workspace / "artifacts/ppo/model")
    report, _ = run(workspace, gate={"min_prompts": 2, "max_most_common": 1.0, "min_distinct": 0.0})
    against = report["comparisons"]["champion_before"]
    assert (against["thumbs_up_gain"], against["ties"], against["win_rate"]) == (0.0, 1.0, 0.5)
    assert (against["perplexity_ratio"], against["length_ratio"]) == (1.0, 1.0)
    assert report["gate"]["checks"]["thumbs"] is False


def test_a_champion_that_is_neither_is_judged_itself(workspace: Path, folders: dict[str, Path]) -> None:
    place = workspace / ".thumbwheel/models/champion"
    shutil.copytree(folders["uniform"], place)
    name_champion(workspace, ".thumbwheel/models/champion")
    report, _ = run(workspace)
    vocabulary = json.loads((place / "config.json").read_text())["vocab_size"]
    assert report["champion_before"]["perplexity"] == pytest.approx(vocabulary, rel=1e-4)
    assert len({report[role]["model_hash"] for role in judge.ROLES}) == 3


def test_a_champion_with_another_tokenizer_still_answers(workspace: Path, tmp_path: Path) -> None:
    other = Tokenizer.train(sentences(50), 290)
    save_model(tiny(other, 9), workspace / ".thumbwheel/models/old", other)
    name_champion(workspace, ".thumbwheel/models/old")
    report, _ = run(workspace)
    assert "kl_per_answer" not in report["champion_before"]
    assert "perplexity" not in report["champion_before"]
    assert isinstance(report["champion_before"]["relevance"], float)
    assert report["comparisons"]["champion_before"]["perplexity_ratio"] is None


def test_true_answers_are_told_from_others_by_likelihood(workspace: Path, folders: dict[str, Path]) -> None:
    sft = Contender(folders["sft"])
    path = workspace / "artifacts/curate/sft.heldout.jsonl"
    asked = retention.questions(path, sft.tokenizer, 64, 9, seed=1)
    assert asked == retention.questions(path, sft.tokenizer, 64, 9, seed=1)
    assert len(asked) == 9 and all(len(set(map(tuple, q.answers))) == 4 for q in asked)
    empty = sft.tokenizer.encode_chat([{"role": "user", "content": ""}])
    told = retention.right(sft.model, asked, empty)
    for question, found in zip(asked, told, strict=True):
        gains = [
            float(np.subtract(*judge.total_logprobs(sft.model, [question.prompt, empty], [answer] * 2)))
            for answer in question.answers
        ]
        assert found == (max(range(4), key=lambda i: gains[i]) == 0)
    uniform = Contender(folders["uniform"])
    assert not any(retention.right(uniform.model, asked, empty))  # no answer gains anything: a tie is no answer
    assert retention.questions(path, sft.tokenizer, 4, 9, seed=1) == []


def test_what_experts_said_of_held_out_answers_is_asked_of_both_models(workspace: Path, tokenizer: Tokenizer) -> None:
    rows = []
    for number, (better, worse) in enumerate(pairwise(sentences(21))):
        prompt = tokenizer.encode_chat([{"role": "user", "content": f"say {number}"}])
        row = {"kind": "comparison", "prompt_ids": prompt, "source": "human_expert"}
        rows.append(row | {"chosen_ids": tokenizer.encode(better), "rejected_ids": tokenizer.encode(worse)})
    rows.append(rows[0] | {"source": "human_user"})
    (workspace / "artifacts/snapshot/opinions.heldout.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report, _ = run(workspace)
    expert = report["expert"]
    assert (expert["pairs"], expert["against"]) == (20, "champion_before")
    assert expert["gain"] == pytest.approx(expert["candidate"] - expert["before"], abs=1e-6)
    model = Contender(workspace / "artifacts/ppo/model").model
    likelier = [
        judge.total_logprobs(model, [r["prompt_ids"]], [r["chosen_ids"]])[0] / len(r["chosen_ids"])
        > judge.total_logprobs(model, [r["prompt_ids"]], [r["rejected_ids"]])[0] / len(r["rejected_ids"])
        for r in rows[:20]
    ]
    assert expert["candidate"] == pytest.approx(np.mean(likelier))
    assert "expert" in report["gate"]["checks"]


def test_a_judge_of_the_teams_own_takes_part_and_can_stop_it(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workspace / "house_judge.py").write_text(
        "def shorter(messages, first, second):\n"
        "    return 'tie' if len(first) == len(second) else 'first' if len(first) < len(second) else 'second'\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    report, output = run(
        workspace, judges=[{"name": "short", "kind": "callable", "target": "house_judge:shorter", "prompts": 10}]
    )
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()][:10]
    points = [(len(r["champion_before"]["text"]), len(r["candidate"]["text"])) for r in answers]
    expected = np.mean([0.5 if a == b else float(b < a) for a, b in points])
    told = report["pairwise"]["short"]
    assert (told["pairs"], told["win_rate"], told["cost"]) == (10, pytest.approx(expected), {"calls": 20})
    assert (told["position_bias"], told["consistent"]) == (0.0, 1.0)
    assert "judge short" in report["gate"]["checks"]


def test_a_changed_champion_folder_is_noticed(workspace: Path) -> None:
    content = {"model_hash": "0" * 64, "path": "artifacts/sft/model"}
    (workspace / "champion.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"champion\.json names model 0{12}, but artifacts/sft/model holds"):
        run(workspace)


def test_perplexity_of_a_uniform_model_is_its_vocabulary(folders: dict[str, Path]) -> None:
    contender = Contender(folders["uniform"])
    found = judge.perplexity(contender.model, np.arange(150) % 7)
    assert found == pytest.approx(contender.tokenizer.vocab_size, rel=1e-5)
    with pytest.raises(ValueError, match="holds no text"):
        judge.perplexity(contender.model, np.array([3]))


def test_kl_to_a_uniform_model_is_the_answers_log_probability_plus_log_of_the_vocabulary(
    folders: dict[str, Path],
) -> None:
    model, uniform = Contender(folders["ppo"]), Contender(folders["uniform"])
    prompts = [model.tokenizer.encode_chat([{"role": "user", "content": t}]) for t in sentences(5)]
    answers = generate(model.model, prompts, stop_id=model.tokenizer.stop_id, max_new_tokens=6, seeds=range(5), width=2)
    reference = judge.total_logprobs(uniform.model, prompts, [a.ids for a in answers])
    found = judge.kl_per_answer(answers, reference)
    own = judge.total_logprobs(model.model, prompts, [a.ids for a in answers])
    expected = [o + len(a.ids) * math.log(model.tokenizer.vocab_size) for o, a in zip(own, answers, strict=True)]
    assert found == pytest.approx(expected, abs=1e-3)


def test_relevance_is_own_less_the_mean_of_every_other_prompt(folders: dict[str, Path]) -> None:
    """With three prompts and two others each, the pairing is everyone against everyone."""
    sft = Contender(folders["sft"])
    prompts = [sft.tokenizer.encode_chat([{"role": "user", "content": t}]) for t in sentences(3)]
    answers = [sft.tokenizer.encode(t) for t in ("yes", "no maybe", "fine day")]
    own = judge.total_logprobs(sft.model, prompts, answers)
    found = judge.relevance(sft.model, prompts, answers, own, seed=1, others=2)
    table = [[float(judge.total_logprobs(sft.model, [p], [a])[0]) for p in prompts] for a in answers]
    expected = [table[i][i] - (sum(table[i]) - table[i][i]) / 2 for i in range(3)]
    assert found == pytest.approx(expected, abs=1e-4)
    uniform = Contender(folders["uniform"])
    own = judge.total_logprobs(uniform.model, prompts, answers)
    assert judge.relevance(uniform.model, prompts, answers, own, seed=1) == pytest.approx([0, 0, 0], abs=1e-4)


def judged(thumbs: list[bool], texts: list[str], cut: int = 0) -> Judged:
    n = len(texts)
    ended = [i >= cut for i in range(n)]
    return Judged("h" * 64, texts, [len(t.split()) for t in texts], ended, thumbs, thumbs, [1.0] * n, [0.5] * n, 10.0)


def test_report_by_hand() -> None:
    before = judged([True, False, False, False], ["a b", "c", "d", "e"])
    after = judged([True, True, True, False], ["Yeah", "Yeah", "Yeah", "e"], cut=1)
    report = judge.make_report(
        {"sft": before, "champion_before": before, "candidate": after}, seed=1, language="en", resamples=100
    )
    candidate, against = report["candidate"], report["comparisons"]["champion_before"]
    assert candidate["thumbs_up_rate"] == 0.75
    assert candidate["kl_per_answer"] == candidate["kl_per_answer_low"] == 1.0
    assert (candidate["most_common_answer"], candidate["most_common_share"]) == ("Yeah", 0.75)
    assert candidate["distinct_answers"] == 0.5
    assert (report["sft"]["ended_share"], candidate["ended_share"]) == (1.0, 0.75)
    assert candidate["length_characters"] == 3.25
    assert candidate["character_distinct_4"] == pytest.approx(1 / 3, abs=1e-6)
    assert candidate["relevance_per_token"] == 0.5
    assert against["thumbs_up_gain"] == 0.5
    assert (against["wins"], against["ties"], against["losses"]) == (0.5, 0.5, 0.0)
    assert against["win_rate"] == 0.75
    assert against["length_ratio"] == pytest.approx(3.25 / 1.5, abs=1e-6)
    assert (against["relevance_kept"], against["perplexity_ratio"]) == (1.0, 1.0)


def test_prompts_that_leave_no_room_for_an_answer_are_left_out(folders: dict[str, Path]) -> None:
    sft = Contender(folders["sft"])
    short = Prompt("a", [{"role": "user", "content": "yes"}], 1)
    long = Prompt("b", [{"role": "user", "content": "yes " * 100}], 1)
    assert fitting([short, long], [sft], 8) == [short]


@pytest.mark.parametrize("change", [{"prompts": 0}, {"temperature": 0.0}, {"bootstrap": 0}])
def test_impossible_options_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        JudgeOptions(**change)


def test_random_streams_differ_by_prompt_and_by_seed() -> None:
    make: Callable[[int, str], int] = stream_seed
    assert make(1, "a") == make(1, "a")
    assert len({make(1, "a"), make(1, "b"), make(2, "a")}) == 3
