"""The reward model: what people would think of an answer, learned from lone thumbs and from answers to one prompt.

Two terms over one score r(x, y), the head's reading at an answer's last token:
- pairs: all answers to a prompt are one element, with one forward pass over each and one over the prompt; the mean of
  −log σ(r_w − r_l − m) over the prompt's pairs, then the mean over prompts (InstructGPT, Ouyang et al. 2022, eq. 1; ties are
  left out). A margin m makes r tell strong preferences further apart (Llama 2, Touvron et al. 2023); it is 0 unless asked
  for;
- thumbs: −log σ(v·(r + b)) with v = ±1 and an offset b of its own, so that the share of thumbs up does not move r.
After training r is shifted and scaled to mean 0 and variance 1 over the answers that were rated (Ziegler et al. 2019).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.baselines import bag_of_words_accuracy, length_accuracy
from models.checkpoint import load_model, read_config, read_weights, write_folder
from models.compute import PLAIN, ComputeOptions
from models.distributed import shard, whole
from models.figures import Figures
from models.huggingface import from_huggingface, to_huggingface, write_config
from models.intervals import wilson
from models.job import Job
from models.layout import Layout, branched_layout, packed_layout
from models.lora import Learned, LoraOptions, what_learns
from models.memory import smaller
from models.opinions import Preference, Rated, read_opinions
from models.optim import Optimizer, learning_rate
from models.tokenizer import Tokenizer
from models.training import Training, TrainingOptions, batches, torch_generator
from models.transformer import Transformer


@dataclass(frozen=True)
class RewardOptions(TrainingOptions):
    """Section `reward` of params.yaml. A step sees batch_size prompts with all their rated answers.

    micro_batch: prompts in memory at a time (of each process), null for all of the step's; the gradient is that of the whole
    batch.
    margin: by how much r should tell apart a pair of the usual strength; centering_coefficient: of (r_w + r_l)² in each
    pair, which keeps r around 0 (Eisenstein et al. 2023; 0.01 is usual).
    """

    epochs: int = 2
    batch_size: int = 8
    micro_batch: int | None = None
    learning_rate: float = 6e-4
    warmup_steps: int = 10
    weight_decay: float = 0.1
    pair_weight: float = 1.0
    thumb_weight: float = 1.0
    margin: float = 0.0
    centering_coefficient: float = 0.0
    clip_norm: float = 1.0
    checkpoint_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("epochs", "batch_size", *(["micro_batch"] if self.micro_batch is not None else []))
        if self.pair_weight < 0 or self.thumb_weight < 0 or self.pair_weight + self.thumb_weight == 0:
            raise ValueError("pair_weight and thumb_weight must not be negative, and one must be above 0")
        if self.margin < 0 or self.centering_coefficient < 0:
            raise ValueError("margin and centering_coefficient must not be negative")


class RewardModel(nn.Module):
    """A decoder whose output layer is one number r. The same network is PPO's critic at its start.

    The probability of a thumb up is σ(scale·(r + offset)): scale is 1 while it learns, and keeps what normalise divides by.
    """

    scale: Tensor

    def __init__(self, trunk: Transformer) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.hidden_size, 1)
        self.offset = nn.Parameter(torch.zeros(1))
        self.register_buffer("scale", torch.ones(()))

    def initialize(self, generator: torch.Generator) -> RewardModel:
        """Head normal(0, 1/sqrt(d + 1)), bias 0 (Stiennon et al. 2020)."""
        with torch.no_grad():
            self.head.weight.normal_(0.0, (self.head.in_features + 1) ** -0.5, generator=generator)
            self.head.bias.zero_()
        return self

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """The head's reading after every token: tokens [N] → [N]."""
        return self._read(self.trunk(tokens, layout))

    def scores(self, tokens: Tensor, layout: Layout) -> Tensor:
        """r of each sequence, read at its last token: tokens [N] → [B]."""
        return self._read(self.trunk(tokens, layout, layout.last))

    def _read(self, hidden: Tensor) -> Tensor:
        return self.head(hidden.to(self.head.weight.dtype))[:, 0].float()

    def probability(self, scores: Tensor) -> Tensor:
        """The probability of a thumb up for scores r, of any shape."""
        return torch.sigmoid(self.scale * (scores + self.offset))


def lay_out(sequences: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Layout]:
    """Sequences end to end: tokens [N] and their layout."""
    tokens = torch.tensor([t for s in sequences for t in s], device=device)
    return tokens, packed_layout([len(s) for s in sequences], device)


def lay_out_rated(batch: Sequence[Rated], device: torch.device | str) -> tuple[Tensor, Layout]:
    """All answers to each prompt, whose tokens stand there once: tokens [N], and the layout of the answers."""
    tokens = torch.tensor([t for rated in batch for ids in (rated.prompt, *rated.answers) for t in ids], device=device)
    answers = [[len(answer) for answer in rated.answers] for rated in batch]
    return tokens, branched_layout([len(rated.prompt) for rated in batch], answers, device)


@torch.inference_mode()
def score(
    model: RewardModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], tokens_per_batch: int = 4096
) -> list[float]:
    """r(prompt, answer) for every pair of id lists."""
    sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    device = model.head.weight.device
    out = [0.0] * len(sequences)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and len(sequences[order[stop]]) * (stop - start + 1) <= tokens_per_batch:
            stop += 1
        part = order[start:stop]
        for i, value in zip(part, model.scores(*lay_out([sequences[i] for i in part], device)).tolist(), strict=True):
            out[i] = value
        start = stop
    return out


def pair_losses(scores: Tensor, pairs: Sequence[Preference], margin: float = 0.0, centering: float = 0.0) -> Tensor:
    """−log σ(r_w − r_l − margin·strength) + centering·(r_w + r_l)² of each pair of answers with these scores: [pairs]."""
    winners, losers = scores[[p.winner for p in pairs]], scores[[p.loser for p in pairs]]
    strengths = scores.new_tensor([p.strength for p in pairs])
    return F.softplus(margin * strengths - (winners - losers)) + centering * (winners + losers).square()


def thumb_losses(scores: Tensor, values: Tensor, offset: Tensor) -> Tensor:
    """−log σ(v·(r + b)) of each answer: scores [n], values [n] of ±1."""
    return F.softplus(-values * (scores + offset))


class Counts(NamedTuple):
    """What a batch's means are over: its thumbs, and its prompts that have a pair."""

    thumbs: int
    prompts: int


def counts_of(batch: Sequence[Rated]) -> Counts:
    """The counts of a whole batch, however it is cut."""
    return Counts(sum(1 for rated in batch for v in rated.values if v), sum(1 for rated in batch if rated.pairs()))


def batch_loss(
    model: RewardModel, batch: Sequence[Rated], options: RewardOptions, counts: Counts | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What prompts add to their batch's loss, and to its figures (models.figures): one forward pass over each prompt and each
    of its answers.

    counts: of the whole batch where these are a part of it, the same in all processes: it says which terms there are.
    """
    counts = counts or counts_of(batch)
    device = model.head.weight.device
    scores = model.scores(*lay_out_rated(batch, device))
    total, figures = 0.0 * scores.sum(), dict[str, Tensor]()
    if counts.thumbs:
        values = torch.tensor([v for rated in batch for v in rated.values], device=device, dtype=torch.float32)
        thumbs = (values.abs() * thumb_losses(scores, values, model.offset)).sum() / counts.thumbs
        right = ((scores + model.offset > 0) == (values > 0)) & (values != 0)
        figures |= {"thumb_loss": thumbs, "accuracy": right.sum() / counts.thumbs}
        total = total + options.thumb_weight * thumbs
    if counts.prompts and options.pair_weight:
        pairs: list[Preference] = []
        weights: list[float] = []
        start = 0
        for rated in batch:
            own = rated.pairs()
            pairs += [pair._replace(winner=start + pair.winner, loser=start + pair.loser) for pair in own]
            weights += [1 / (len(own) * counts.prompts) for _ in own]
            start += len(rated.answers)
        losses = pair_losses(scores, pairs, options.margin, options.centering_coefficient)
        figures["pair_loss"] = (scores.new_tensor(weights) * losses).sum()
        total = total + options.pair_weight * figures["pair_loss"]
    return total, figures


def save_reward_model(model: RewardModel, folder: Path, tokenizer: Tokenizer, card: str) -> None:
    """Write the folder that transformers loads as the family's class for sequence classification (whose head has no bias:
    it is kept in config.json as reward_bias, beside thumb_offset and thumb_scale)."""
    config = write_config(model.trunk.config, head="SequenceClassification") | {
        "num_labels": 1,
        "reward_bias": model.head.bias.item(),
        "thumb_offset": model.offset.item(),
        "thumb_scale": model.scale.item(),
    }
    tensors = {k: v for k, v in to_huggingface(model.trunk).items() if k != "lm_head.weight"}
    write_folder(folder, config, tensors | {"score.weight": model.head.weight.detach()}, tokenizer, card)


def load_reward_model(folder: str | os.PathLike[str], device: str = "cpu") -> RewardModel:
    """Read what save_reward_model wrote. Raises FileNotFoundError, ValueError."""
    path = Path(folder)
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if "reward_bias" not in raw:
        raise ValueError(f"{path}/config.json is not a reward model's: architectures is {raw.get('architectures')}")
    tensors = read_weights(path)
    head = tensors.pop("score.weight")
    config = read_config(path, head="SequenceClassification")
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = RewardModel(from_huggingface(config, tensors))
    with torch.no_grad():
        model.head.weight.copy_(head)
        model.head.bias.fill_(raw["reward_bias"])
        model.offset.fill_(raw["thumb_offset"])
        model.scale.fill_(raw["thumb_scale"])
    return model.to(device).eval()


@torch.no_grad()
def normalise(model: RewardModel, scores: Sequence[float]) -> None:
    """Fold gain and bias into the head so that these scores get mean 0 and variance 1; probabilities stay the same."""
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores)) or 1.0
    model.head.weight.div_(deviation)
    model.head.bias.sub_(mean).div_(deviation)
    model.offset.add_(mean).div_(deviation)
    model.scale.mul_(deviation)


def run(job: Job) -> dict[str, Any]:
    """The stage body: artifacts/sft/model + artifacts/snapshot → model/, metrics.json, curves.csv."""
    options = job.options("reward", RewardOptions)
    base = job.input("artifacts/sft/model")
    snapshot = job.input("artifacts/snapshot")
    tokenizer = Tokenizer.load(base)
    config = read_config(base)
    size, context = config.vocab_size, config.context_length
    train, heldout = (read_opinions(snapshot / f"opinions.{s}.jsonl", size, context) for s in ("train", "heldout"))
    if not train or not heldout:
        raise ValueError(
            f"artifacts/snapshot has {len(train)} rated prompts to learn and {len(heldout)} held out: collect more opinions"
        )
    lora, ranks, most = job.options("lora", LoraOptions), job.ranks, options.micro_batch

    def fresh() -> RewardModel:
        made = RewardModel(load_model(base)).initialize(torch_generator(job.seed, "reward head"))
        what_learns(made.trunk, lora, torch_generator(job.seed, "lora", "reward"))  # the head learns in any case
        return made.to(job.device)

    model = fresh()
    learned = Learned(model) if lora.rank else model
    model.trunk.compute = compute = job.options("training", ComputeOptions)
    shard(model, model.trunk.layers, compute, methods=["scores"])
    optimizer = Optimizer(model, weight_decay=options.weight_decay)
    steps = options.epochs * math.ceil(len(train) / options.batch_size)
    training = Training(job, options, steps, {"model": learned, "optimizer": optimizer})
    model.train()

    fullest, parts = training.fullest([rated.tokens() for rated in train], options.batch_size, most)
    largest, everything = [train[i] for i in next(ranks.cut(fullest, most))[0]], counts_of(train)
    answers, count = sum(len(rated.answers) for rated in largest), sum(rated.tokens() for rated in largest)
    what = f"reward: {len(largest)} prompts with {answers} answers of {count} tokens together"
    remedy = smaller("reward", len(largest))
    training.rehearse(model, lambda: batch_loss(model, largest, options, everything)[0], what, remedy, parts)
    clock, seen = time.perf_counter(), 0
    for step, chosen in batches(len(train), options.batch_size, job.seed, training.first, steps):
        # 1. a batch of prompts, each with all its answers
        batch = by_length([train[i] for i in chosen])
        # 2. loss and gradient: means over the whole batch, however it is cut
        counts, figures = counts_of(batch), Figures()
        for mine, weight in ranks.cut(batch, most):
            loss, shares = batch_loss(model, mine, options, counts)
            (loss * weight * ranks.size).backward()
            figures.add({"loss": loss, **shares}, weight)
        # 3. the step
        rate = learning_rate(step, steps, options.learning_rate, options.warmup_steps, floor=0.0)
        norm, taken = optimizer.step(rate, options.clip_norm)
        training.skipped += not taken
        training.computed(model.trunk.config.training_flops([rated.tokens() for rated in batch]))
        seen += sum(len(rated.answers) for rated in batch)
        # 4. records
        done = step + 1
        if training.logs(done):
            speed = seen / (time.perf_counter() - clock)
            clock, seen = time.perf_counter(), 0
            row = {"learning_rate": rate, "gradient_norm": norm, **figures.total()}
            training.log(done, row, {"answers_per_second": speed})
        training.checkpoint(done)

    model = whole(model, fresh)
    model.trunk.compute = PLAIN  # what is measured is measured in fp32
    if not ranks.first:
        return {}
    normalise(model, score(model, [r.prompt for r in train for _ in r.answers], [a for r in train for a in r.answers]))
    metrics = evaluate(model, train, heldout, tokenizer) | {"skipped_steps": training.skipped}
    card = (
        "# thumbwheel reward model\n\nScores an answer at its last token; mean 0 and variance 1 over the rated answers."
    )
    save_reward_model(model, job.output / "model", tokenizer, card)
    training.finish(metrics)
    return metrics


def by_length(opinions: Iterable[Rated]) -> list[Rated]:
    """The prompts, those with the fewest tokens first."""
    return sorted(opinions, key=Rated.tokens)


def evaluate(
    model: RewardModel, train: Sequence[Rated], heldout: Sequence[Rated], tokenizer: Tokenizer
) -> dict[str, float]:
    """How well r tells what people think of held-out answers: thumbs, and pairs, where there are any."""
    scores = score(model, [r.prompt for r in heldout for _ in r.answers], [a for r in heldout for a in r.answers])
    return _thumb_metrics(model, train, heldout, scores, tokenizer) | _pair_metrics(heldout, scores)


def _thumb_metrics(
    model: RewardModel, train: Sequence[Rated], heldout: Sequence[Rated], scores: Sequence[float], tokenizer: Tokenizer
) -> dict[str, float]:
    """Accuracy of sign(r + b) on held-out thumbs with Wilson's 95 % interval, beside majority, length and bag-of-words."""
    learned = [(a, v) for r in train for a, v in zip(r.answers, r.values, strict=True) if v]
    answers = [(a, v) for r in heldout for a, v in zip(r.answers, r.values, strict=True)]
    rated = [(s, a, v) for s, (a, v) in zip(scores, answers, strict=True) if v]
    if not learned or not rated:
        return {}
    test = [(a, v) for _, a, v in rated]
    right = sum((s + model.offset.item() > 0) == (v > 0) for s, _, v in rated)
    up, down = ([s for s, _, v in rated if v == value] for value in (1, -1))
    accuracy = wilson(right, len(rated))
    return {
        "heldout": len(rated),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "majority": max(len(up), len(down)) / len(rated),
        "length_baseline": length_accuracy(learned, test),
        "bag_of_words_baseline": bag_of_words_accuracy(learned, test, tokenizer.vocab_size),
        "score_up": sum(up) / max(1, len(up)),
        "score_down": sum(down) / max(1, len(down)),
        "rated": len(learned),
        "up_share": sum(v > 0 for _, v in learned) / len(learned),
    }


def _pair_metrics(heldout: Sequence[Rated], scores: Sequence[float]) -> dict[str, float]:
    """Share of held-out pairs that r orders as people did, with Wilson's 95 % interval (which takes pairs as independent)."""
    right = count = start = 0
    for rated in heldout:
        of = scores[start : start + len(rated.answers)]
        start += len(of)
        pairs = rated.pairs()
        right += sum(of[pair.winner] > of[pair.loser] for pair in pairs)
        count += len(pairs)
    if not count:
        return {}
    accuracy = wilson(right, count)
    return {
        "heldout_pairs": count,
        "pair_accuracy": accuracy.value,
        "pair_accuracy_low": accuracy.low,
        "pair_accuracy_high": accuracy.high,
    }
