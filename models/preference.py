"""What DPO and KTO share: the policy learns from the rated answers themselves, with neither reward model nor sampling.

The reference is the SFT model, whose log-probabilities of the rated answers are worked out once, before training. The log
ratio of an answer y to a prompt x is log π(y|x) − log π_ref(y|x), summed over y's tokens; β times it is the reward that the
policy stands for (Rafailov et al. 2023, eq. 5).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.checkpoint import load_model, save_model
from models.compute import PLAIN, ComputeOptions
from models.corpus import Sequences
from models.distributed import shard, whole
from models.figures import Figures
from models.intervals import wilson
from models.job import Job
from models.layout import branched_layout
from models.lora import LoraOptions, save_adapter, what_learns
from models.losses import log_probs
from models.memory import smaller
from models.opinions import Rated, read_opinions
from models.optim import Optimizer, learning_rate
from models.ptx import PtxOptions, add_ptx_gradient, check_ptx
from models.reward import RewardModel, load_reward_model, score
from models.rollout import generate, sequence_logprobs
from models.tokenizer import Tokenizer
from models.training import Training, batches, stream, torch_generator
from models.transformer import Transformer

Ids = list[int]


@dataclass(frozen=True)
class PreferenceOptions(PtxOptions):
    """What the sections `dpo` and `kto` of params.yaml share.

    beta: how dear it is to leave the reference. micro_batch: pairs or thumbs in memory at a time (of each process), null for
    all of the step's; the gradient is that of the whole batch. samples: prompts that the finished policy answers for its
    figures, with max_new_tokens at most.
    """

    epochs: int = 2
    batch_size: int = 32
    micro_batch: int | None = None
    beta: float = 0.3
    learning_rate: float = 3e-4
    warmup_steps: int = 5
    samples: int = 128
    max_new_tokens: int = 32
    clip_norm: float = 1.0
    checkpoint_every: int = 20
    log_every: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("epochs", "batch_size", "samples", "max_new_tokens")
        if self.micro_batch is not None:
            self.at_least_one("micro_batch")
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, not {self.beta}")


Parts = Sequence[tuple[Sequence[int], float]]  # a process's elements of a batch, and what their loss weighs (Ranks.cut)
Shares = dict[str, Tensor]  # what a part adds to figures of the batch (models.figures)


class Method(Protocol):
    """What is learned from, and the loss: DPO's pairs or KTO's thumbs. `len` is the number of elements in an epoch."""

    def __len__(self) -> int: ...

    def tokens(self, element: int) -> int:
        """How many tokens an element's forward pass has."""
        ...

    def losses(self, policy: Transformer, chosen: Sequence[int], parts: Parts) -> Iterator[tuple[Tensor, Shares]]:
        """What each part adds to the mean loss of the batch `chosen`, and to figures for the curve."""
        ...


class Answers:
    """Answers to prompts with the reference's log-probabilities: all of a prompt's tokens are given, an answer's predicted."""

    def __init__(self, reference: Transformer, prompts: Sequence[Ids], answers: Sequence[Ids]) -> None:
        self.prompts, self.answers = prompts, answers
        self.reference = [sum(row) for row in sequence_logprobs(reference, prompts, answers)]

    def __len__(self) -> int:
        return len(self.answers)

    def tokens(self, i: int) -> int:
        """Tokens of answer i and its prompt."""
        return len(self.prompts[i]) + len(self.answers[i])

    def logprobs(self, policy: Transformer, chosen: Sequence[int]) -> Tensor:
        """log π of the answers `chosen`: [len(chosen)]."""
        return answer_logprobs(policy, [self.prompts[i] for i in chosen], [self.answers[i] for i in chosen])

    def references(self, chosen: Sequence[int]) -> Tensor:
        """log π_ref of the answers `chosen`: [len(chosen)]."""
        return torch.tensor([self.reference[i] for i in chosen])

    def log_ratios(self, policy: Transformer, chosen: Sequence[int]) -> Tensor:
        """log π − log π_ref of the answers `chosen`: [len(chosen)]."""
        logp = self.logprobs(policy, chosen)
        return logp - self.references(chosen).to(logp.device)

    def lengths(self, chosen: Sequence[int]) -> Tensor:
        """Tokens of the answers `chosen`, as numbers to divide by: [len(chosen)]."""
        return torch.tensor([len(self.answers[i]) for i in chosen], dtype=torch.float32)


def answer_logprobs(model: Transformer, prompts: Sequence[Ids], answers: Sequence[Ids]) -> Tensor:
    """log π(answer | prompt) of each pair of id lists, with its gradient: [B]. Neighbours with one prompt share its tokens."""
    tokens: list[int] = []
    rows: list[
        int
    ] = []  # tokens whose hidden state is read; a prompt's last one predicts the first token of all its answers
    read: list[int] = []  # which of the rows predicts each token of the answers
    groups = [(prompt, list(found)) for prompt, found in groupby(range(len(prompts)), key=lambda i: prompts[i])]
    inputs = [[answers[i][:-1] or answers[i] for i in found] for _, found in groups]  # the last token predicts nothing
    for (prompt, found), own in zip(groups, inputs, strict=True):
        tokens += prompt
        first = len(rows)
        rows.append(len(tokens) - 1)
        for i, ids in zip(found, own, strict=True):
            read += [first, *range(len(rows), len(rows) + len(answers[i]) - 1)]
            rows += range(len(tokens), len(tokens) + len(answers[i]) - 1)
            tokens += ids
    device = model.embedding.weight.device
    layout = branched_layout([len(prompt) for prompt, _ in groups], [list(map(len, own)) for own in inputs], device)
    hidden = model(torch.tensor(tokens, device=device), layout, torch.tensor(rows, device=device))
    targets = torch.tensor([token for answer in answers for token in answer], device=device)
    by_token = log_probs(hidden[torch.tensor(read, device=device)], model.head_weight, targets)
    return pad_sequence(list(by_token.split([len(a) for a in answers])), batch_first=True).sum(1)


class Pairs(NamedTuple):
    """Answers to prompts (the ids of prompts[i] go with answers[i]), and which are better than which: (better, worse) by
    index. An answer that is in several pairs is there once."""

    prompts: list[Ids]
    answers: list[Ids]
    pairs: list[tuple[int, int]]


def find_pairs(opinions: Sequence[Rated]) -> Pairs:
    """All pairs of the opinions (Rated.pairs)."""
    out = Pairs([], [], [])
    for rated in opinions:
        if found := rated.pairs():
            start = len(out.answers)
            out.pairs.extend((start + pair.winner, start + pair.loser) for pair in found)
            out.prompts.extend([rated.prompt] * len(rated.answers))
            out.answers.extend(rated.answers)
    return out


# -- the stage ---------------------------------------------------------------------------------------------------------


def learn(
    job: Job, name: str, options: PreferenceOptions, prepare: Callable[[Transformer, Sequence[Rated]], Method]
) -> dict[str, Any]:
    """The body of the stages dpo and kto: SFT model, opinions → model/, metrics.json, curves.csv.

    prepare: makes what is learned from, of the reference and the opinions; raises ValueError when they hold nothing of it.
    """
    base, folder = job.input("artifacts/sft/model"), job.input("artifacts/tokenize")
    snapshot, rewarder = job.input("artifacts/snapshot"), job.input("artifacts/reward/model")
    tokenizer, policy = Tokenizer.load(base), load_model(base, job.device)
    tokens = np.load(folder / "pretrain.train.npy", mmap_mode="r")
    chats = Sequences.load(folder / "sft.train.npz")
    size, context = policy.config.vocab_size, policy.config.context_length
    train, heldout = (read_opinions(snapshot / f"opinions.{s}.jsonl", size, context) for s in ("train", "heldout"))
    check_ptx(name, options, len(tokens), len(chats), policy.config.text_window)
    policy.compute = compute = job.options("training", ComputeOptions)
    method = prepare(policy, train)
    lora, ranks, most = job.options("lora", LoraOptions), job.ranks, options.micro_batch
    learned = what_learns(policy, lora, torch_generator(job.seed, "lora", name))
    shard(policy, policy.layers, compute)
    optimizer = Optimizer(policy, betas=(0.9, 0.95), eps=1e-5)
    steps = options.epochs * math.ceil(len(method) / options.batch_size)
    training = Training(job, options, steps, {"policy": learned, "optimizer": optimizer})
    policy.train()

    def remember(key: str | int) -> float:
        return add_ptx_gradient(policy, tokens, chats, options, stream(job.seed, "ptx", key), ranks)

    rehearse(training, name, options, method, policy, lambda: remember("rehearsal"))
    clock, seen = time.perf_counter(), 0
    # 1. a batch of pairs or thumbs
    for step, chosen in batches(len(method), options.batch_size, job.seed, training.first, steps):
        # 2. loss and gradient, that of the language-modelling loss in the same buffer
        parts, figures = list(ranks.cut(sorted(chosen, key=method.tokens), most)), Figures()
        for (_, weight), (loss, shares) in zip(parts, method.losses(policy, chosen, parts), strict=True):
            (loss * weight * ranks.size).backward()
            figures.add({"loss": loss, **shares}, weight)
        if options.ptx_coefficient:
            figures.add({"ptx_loss": torch.tensor(remember(step), device=job.device)})
        # 3. the step
        rate = learning_rate(step, steps, options.learning_rate, options.warmup_steps, shape="linear")
        norm, taken = optimizer.step(rate, options.clip_norm)
        training.skipped += not taken
        training.computed(policy.config.training_flops([method.tokens(i) for i in chosen]))
        seen += len(chosen)
        # 4. records
        done = step + 1
        if training.logs(done):
            speed = seen / (time.perf_counter() - clock)
            clock, seen = time.perf_counter(), 0
            row = {"learning_rate": rate, "gradient_norm": norm, **figures.total()}
            training.log(done, row, {"elements_per_second": speed})
        training.checkpoint(done)

    def blank() -> Transformer:
        made = load_model(base, job.device)
        what_learns(made, lora, torch_generator(job.seed, "lora", name))
        return made

    policy = whole(policy, blank)
    policy.compute = PLAIN  # what is measured is measured in fp32
    if not ranks.first:
        return {}
    reference = load_model(base, job.device)
    metrics: dict[str, Any] = {"elements": len(method), "skipped_steps": training.skipped}
    metrics |= heldout_pairs(policy, reference, heldout)
    prompts = Sequences.load(folder / "prompts.train.npz")
    metrics |= sample(policy, reference, load_reward_model(rewarder, job.device), prompts, tokenizer, options, job.seed)
    card = (
        f"# thumbwheel {name.upper()} model\n\nThe SFT model after {name.upper()} on people's opinions of its answers."
    )
    save_model(policy, job.output / "model", tokenizer, card)
    if lora.rank:
        save_adapter(policy, job.output / "model" / "adapter", "artifacts/sft/model")
    training.finish(metrics)
    return metrics


def rehearse(
    training: Training,
    name: str,
    options: PreferenceOptions,
    method: Method,
    policy: Transformer,
    remember: Callable[[], float],
) -> None:
    """Try the batch with the most tokens. remember: adds the language-modelling gradient. Raises MemoryError."""
    sizes = [method.tokens(i) for i in range(len(method))]
    fullest, times = training.fullest(sizes, options.batch_size, options.micro_batch)
    parts = list(training.job.ranks.cut(fullest, options.micro_batch))
    (mine, _), *_ = parts

    def largest() -> Tensor:
        if options.ptx_coefficient:
            remember()
        loss, _ = next(method.losses(policy, fullest, parts))
        return loss

    what = f"{name}: {len(mine)} elements of {sum(map(method.tokens, mine))} tokens together"
    training.rehearse(policy, largest, what, smaller(name, len(mine)), times)


@torch.inference_mode()
def heldout_pairs(policy: Transformer, reference: Transformer, opinions: Sequence[Rated]) -> dict[str, float]:
    """Share of held-out pairs that the policy's log ratios order as people did, with Wilson's 95 % interval (which takes
    pairs as independent); {} without pairs."""
    prompts, answers, pairs = find_pairs(opinions)
    if not pairs:
        return {}
    own, under = (sequence_logprobs(model, prompts, answers) for model in (policy, reference))
    ratios = [sum(a) - sum(b) for a, b in zip(own, under, strict=True)]
    count = len(pairs)
    accuracy = wilson(sum(ratios[better] > ratios[worse] for better, worse in pairs), count)
    return {
        "heldout_pairs": count,
        "pair_accuracy": accuracy.value,
        "pair_accuracy_low": accuracy.low,
        "pair_accuracy_high": accuracy.high,
    }


@torch.inference_mode()
def sample(
    policy: Transformer,
    reference: Transformer,
    judge: RewardModel,
    prompts: Sequences,
    tokenizer: Tokenizer,
    options: PreferenceOptions,
    seed: int,
) -> dict[str, float]:
    """Figures of answers that the policy samples, the same that PPO gives of its own: KL to the reference in nats an answer
    (k1), the probability of a thumb up by the reward model (which taught it nothing here), length, ends."""
    draw = stream(seed, "samples")
    asked = [prompts[int(i)] for i in draw.choice(len(prompts), min(options.samples, len(prompts)), replace=False)]
    answers = generate(
        policy,
        asked,
        stop_id=tokenizer.stop_ids,
        max_new_tokens=options.max_new_tokens,
        seeds=draw.integers(2**62, size=len(asked)).tolist(),
    )
    ids = [answer.ids for answer in answers]
    own, under_reference = (sequence_logprobs(model, asked, ids) for model in (policy, reference))
    scores = torch.tensor(score(judge, asked, ids), device=judge.head.weight.device)
    return {
        "objective_kl": (math.fsum(map(sum, own)) - math.fsum(map(sum, under_reference))) / len(ids),
        "reward_probability": judge.probability(scores).mean().item(),
        "answer_tokens": sum(map(len, ids)) / len(ids),
        "answer_ended": sum(answer.finish_reason == "stop" for answer in answers) / len(ids),
        "answer_distinct": len(set(map(tuple, ids))) / len(ids),
    }
