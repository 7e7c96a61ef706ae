"""What a policy kept of what it knew: does it still tell the true answer from others, does it still side with the experts?

Both read log-probabilities of texts that were never learned from; nothing is sampled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.opinions import read_opinions
from models.rollout import sequence_logprobs
from models.tokenizer import Tokenizer
from models.transformer import Transformer

CHOICES = 4
TIE = 1e-4  # nats; what two equal texts may differ by in fp32


@dataclass(frozen=True)
class Question:
    """A conversation up to an answer, and answers to choose from: the true one stands first."""

    prompt: list[int]
    answers: list[list[int]]


def questions(path: Path, tokenizer: Tokenizer, context: int, count: int, seed: int) -> list[Question]:
    """At most `count` questions of held-out conversations: the true last answer, and three of other conversations.

    As in multiple-choice tests by likelihood (HellaSwag's way); drawn from the seed, the same for all models with this
    tokenizer. Conversations that do not fit the context are passed over; fewer than four different answers make no question.
    """
    turns: list[tuple[list[int], list[int]]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            messages = json.loads(line)["messages"]
            if messages[-1]["role"] != "assistant" or len(messages) < 2:
                continue
            answer = [*tokenizer.encode(messages[-1]["content"]), tokenizer.stop_id]
            turns.append((tokenizer.encode_chat(messages[:-1]), answer))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(turns))
    found: list[Question] = []
    for at in order:
        if len(found) == count:
            break
        prompt, true = turns[at]
        others = {tuple(turns[i][1]) for i in rng.choice(len(turns), size=min(len(turns), 4 * CHOICES), replace=False)}
        wrong = [list(a) for a in sorted(others) if list(a) != true and len(prompt) + len(a) <= context][: CHOICES - 1]
        if len(wrong) == CHOICES - 1 and len(prompt) + len(true) <= context:
            found.append(Question(prompt, [true, *wrong]))
    return found


def right(model: Transformer, asked: Sequence[Question], empty: Sequence[int]) -> list[bool]:
    """Whether the true answer of each question gains more than the others from being read after its prompt. A tie is wrong.

    The gain is log p(answer | prompt) - log p(answer | empty), the domain-conditional PMI of Holtzman et al. 2021 ("Surface
    Form Competition"): by probability alone, short and common answers win whatever was asked. empty: an empty question's ids.
    """
    answers = [a for q in asked for a in q.answers]
    after, alone = (
        np.array([sum(row) for row in sequence_logprobs(model, prompts, answers)])
        for prompts in ([q.prompt for q in asked for _ in q.answers], [list(empty)] * len(answers))
    )
    gains = (after - alone).reshape(len(asked), CHOICES)
    return [bool(row[0] > row[1:].max() + TIE) for row in gains]


@dataclass(frozen=True)
class Judgement:
    """A prompt with an answer that an expert prefers to another, as token ids."""

    prompt: list[int]
    better: list[int]
    worse: list[int]


def expert_judgements(snapshot: Path, work: Path, vocab_size: int, context: int) -> list[Judgement]:
    """The experts' preferences that the snapshot holds out: comparisons, rankings, and a thumb up beside one down.

    work: a folder for the experts' rows alone.
    """
    rows = (snapshot / "opinions.heldout.jsonl").read_text(encoding="utf-8").splitlines()
    theirs = work / "opinions.expert.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    theirs.write_text(
        "".join(row + "\n" for row in rows if json.loads(row)["source"] == "human_expert"), encoding="utf-8"
    )
    return [
        Judgement(rated.prompt, rated.answers[pair.winner], rated.answers[pair.loser])
        for rated in read_opinions(theirs, vocab_size, context)
        for pair in rated.pairs()
    ]


def agrees(model: Transformer, judgements: Sequence[Judgement]) -> list[bool]:
    """Whether the model finds the better answer the likelier one, by the mean log-probability of a token."""
    prompts = [j.prompt for j in judgements]
    better, worse = (
        [float(np.mean(row)) for row in sequence_logprobs(model, prompts, answers)]
        for answers in ([j.better for j in judgements], [j.worse for j in judgements])
    )
    return [b > w for b, w in zip(better, worse, strict=True)]
