"""What people write: from their own answers and questions to the rows that SFT, the reward model and PPO learn from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from feedback import completions
from feedback.completions import Completion
from feedback.opinions import Vote
from feedback.snapshot import bucket
from feedback.store import Store
from flows import curate, snapshot, written
from flows.curate import CurateOptions, dump
from flows.pipeline import METHODS
from flows.retrain import WRITTEN
from flows.values import yaml
from models.corpus import Sequences
from models.job import Job
from models.opinions import read_opinions
from models.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]
PERCENT = 20  # of the prompts, held out from the reward model
Asked = list[dict[str, str]]


def prompt(start: str, held_for_reward: bool = False, side: str = "train") -> Asked:
    """A prompt that begins with these words, in the wished bucket of either fixed hash."""
    split = curate.Kind("prompts", CurateOptions())
    for number in range(10_000):
        asked = [{"role": "user", "content": f"{start} {number}"}]
        if (bucket(asked) < PERCENT) == held_for_reward and split.side(dump(asked)) == side:
            return asked
    raise AssertionError


class Service:
    """A workspace with a tokenizer, curated prompts and a feedback database."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = Tokenizer.train(["what do you like to eat", "I like to eat rice and fish 0123456789"] * 9, 300)
        for folder in (root / "artifacts/sft/model", root / "artifacts/tokenize/tokenizer"):
            folder.mkdir(parents=True)
            self.tokenizer.save(folder)
        (root / "artifacts/sft/model/config.json").write_text(json.dumps({"max_position_embeddings": 90}))
        (root / "artifacts/curate").mkdir()
        for name in ("prompts.report", "prompts.tune", "sft.heldout"):
            self.curated(name, [])
        self.store = Store(f"sqlite:///{root}/.thumbwheel/feedback.db")
        self.store.migrate()
        self.answers = 0

    def curated(self, name: str, prompts: list[Asked]) -> None:
        rows = "".join(json.dumps({"messages": messages}) + "\n" for messages in prompts)
        (self.root / f"artifacts/curate/{name}.jsonl").write_text(rows)

    def answer(self, asked: Asked, response: str = "rice") -> str:
        self.answers += 1
        answer = Completion(
            id=f"chatcmpl-{self.answers}",
            subject="asker",
            request_sha256="0" * 64,
            request_messages=asked,
            sampling={},
            model_hash="a" * 64,
            prompt_token_ids=self.tokenizer.encode_chat(asked),
            response=response,
            response_token_ids=[*self.tokenizer.encode(response), self.tokenizer.stop_id],
            status="complete",
            finish_reason="stop",
        )
        with self.store.write() as connection:
            completions.insert(connection, answer)
        return answer.id

    def edit(self, asked: Asked, correction: str, source: str = "human_user", subject: str = "ann") -> int:
        vote = Vote(self.answer(asked), subject, kind="edit", value=1, correction=correction, source=source)
        return self.store.vote(vote)[0].feedback_id

    def run(self, stage: Any, name: str, **params: Any) -> tuple[Path, dict[str, Any]]:
        deps = ("feedback.manifest.json", WRITTEN, "artifacts/curate", "artifacts/tokenize", "artifacts/sft/model")
        output = self.root / "out" / name
        output.mkdir(parents=True)
        everything = {"snapshot": {"heldout_percent": PERCENT}, **params}
        return output, stage.run(Job("any", self.root, deps, output, self.root / "work", everything))

    def close_batch(self) -> None:
        assert self.store.open_batch() is not None
        (self.root / "feedback.manifest.json").write_text(json.dumps(self.store.manifest()))
        (self.root / WRITTEN).write_text(json.dumps(self.store.written_manifest()))


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.delenv("THUMBWHEEL_DATABASE_URL", raising=False)
    made = Service(tmp_path)
    yield made
    made.store.close()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_own_answer_is_a_conversation_for_sft_a_pair_for_the_reward_model_and_its_question_a_prompt_for_ppo(
    service: Service,
) -> None:
    asked = prompt("what do you eat")
    service.edit(asked, "I like  fish")  # two blanks: what is learned is normalised
    service.close_batch()

    out, summary = service.run(written, "written")
    sequences = Sequences.load(out / "sft.npz")
    ids, learned = sequences[0], sequences.mask(0)
    assert len(sequences) == 1 and summary["batches"] == [1]
    whole = [*asked, {"role": "assistant", "content": "I like fish"}]
    assert (ids, learned) == tuple(map(list, zip(*service.tokenizer.encode_chat_with_mask(whole), strict=True)))

    out, summary = service.run(snapshot, "snapshot")
    (rated,) = read_opinions(out / "opinions.train.jsonl", service.tokenizer.vocab_size, 90)
    stop = service.tokenizer.stop_id
    assert rated.prompt == service.tokenizer.encode_chat(asked)
    assert rated.answers == [[*service.tokenizer.encode(text), stop] for text in ("I like fish", "rice")]
    assert [(p.winner, p.loser, p.strength) for p in rated.pairs()] == [(0, 1, 1.0)]
    (row,) = rows(out / "opinions.train.jsonl")
    assert row["written"] and (summary["train"], summary["train.edits"], summary["tokenised"]) == (1, 1, 0)
    assert [Sequences.load(out / "prompts.npz")[0]] == [service.tokenizer.encode_chat(asked)]


def test_nothing_is_learned_from_what_people_wrote_to_prompts_on_which_figures_are_taken(service: Service) -> None:
    rewarded, reported = prompt("reward", held_for_reward=True), prompt("report", side="heldout")
    tuned, known = prompt("tune", side="tune"), prompt("known to the judge")
    service.curated("prompts.report", [[{"role": "user", "content": known[0]["content"].upper() + "?"}]])
    for asked in (rewarded, reported, tuned, known):
        service.edit(asked, "I like fish")
    expert = prompt("judged by an expert")
    service.edit(expert, "I like fish")
    service.store.vote(Vote("chatcmpl-5", "eve", kind="expert", value=1, source="human_expert"))
    service.close_batch()

    out, summary = service.run(written, "written")
    assert (summary["conversations"], summary["held_out"], summary["batches"]) == (0, 5, [])
    assert len(Sequences.load(out / "sft.npz")) == 0
    out, summary = service.run(snapshot, "snapshot")
    assert (out / "opinions.train.jsonl").read_text() == ""
    assert (summary["heldout.edits"], summary["heldout"]) == (5, 6)
    learned = Sequences.load(out / "prompts.npz")
    read = {service.tokenizer.decode(learned[i]) for i in range(len(learned))}
    assert read == {service.tokenizer.decode(service.tokenizer.encode_chat(asked)) for asked in (rewarded, expert)}


@pytest.mark.parametrize(
    ("correction", "reason"),
    [
        ("wrong \ufffd encoding", "replacement character"),
        ("\u200b", "message 2 is empty"),
        ("y" * 41, "message 2 has 41 characters, not 1 to 40"),
    ],
)
def test_what_the_data_gate_refuses_is_quarantined_with_the_reason(
    service: Service, correction: str, reason: str
) -> None:
    service.edit(prompt("fine"), "I like fish")
    service.edit(prompt("poor"), correction)
    service.close_batch()
    limits = {"validate": {"max_chars_message": 40, "max_chars_text": 40}}
    for stage, kept in ((written, "conversations"), (snapshot, "train.edits")):
        out, summary = service.run(stage, stage.__name__, **limits)
        assert (summary[kept], summary["quarantined"]) == (1, 1)
        (refused,) = rows(out / "quarantine.jsonl")
        assert reason in refused["reason"] and refused["messages"][-1]["content"] == correction
        assert "poor" not in (out / "conversations.jsonl").read_text()


def test_only_what_stands_of_people_is_learned_and_the_manifest_follows_what_they_wrote(service: Service) -> None:
    service.store.vote(Vote(service.answer(prompt("thumb")), "bob", value=1))
    service.close_batch()
    assert service.store.written_manifest() == {"batches": []}  # thumbs alone do not train SFT anew

    kept, rejected, withdrawn = (service.edit(prompt(word), f"own {word}") for word in ("a", "b", "c"))
    service.store.moderate(rejected, "rejected", "rude")
    service.close_batch()
    assert [entry["id"] for entry in service.store.written_manifest()["batches"]] == [2]
    assert service.run(written, "before")[1]["conversations"] == 2

    service.store.moderate(withdrawn, "quarantined", "looks like a robot")
    service.store.vote(Vote(service.answer(prompt("thumb again")), "bob", value=1))
    service.close_batch()
    assert [entry["id"] for entry in service.store.written_manifest()["batches"]] == [2, 3]
    out, summary = service.run(written, "after")
    assert summary["batches"] == [2] and [
        row["messages"][-1]["content"] for row in rows(out / "conversations.jsonl")
    ] == ["own a"]
    service.store.erase("ann")
    with pytest.raises(ValueError, match="erased on demand"):
        service.run(written, "stale")
    (service.root / WRITTEN).write_text(json.dumps(service.store.written_manifest()))
    assert service.run(written, "erased")[1]["conversations"] == 0
    assert kept


def test_new_answers_reach_neither_the_tokenizer_nor_the_base_model() -> None:
    stages = yaml().load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    reads = {name: list(stage.get("do", stage)["deps"]) for name, stage in stages.items()}
    learners = [name for name, deps in reads.items() if {"artifacts/written", "artifacts/snapshot"} & set(deps)]
    assert learners == ["sft", "reward", "policy", "judge"]  # the judge looks at what experts said
    assert not [dep for name in ("tokenize", "pretrain") for dep in reads[name] if "manifest" in dep]
    assert not [dep for dep in reads["written"] if "sft" in dep or dep == "feedback.manifest.json"]
    assert set(METHODS) == {"ppo", "dpo", "kto"}
