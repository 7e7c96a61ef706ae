"""The reward model: what people would think of an answer, learned from lone thumbs and from answers to one prompt.

Two terms over one score r(x, y), the head's reading at an answer's last token:
- pairs: all answers to a prompt are one element with one forward pass each; the mean of −log σ(r_w − r_l) over the
  prompt's pairs, then the mean over prompts (InstructGPT, Ouyang et al. 2022, eq. 1; ties are left out);
- thumbs: −log σ(v·(r + b)) with v = ±1 and an offset b of its own, so that the share of thumbs up does not move r.
After training r is shifted and scaled to mean 0 and variance 1 over the answers that were rated (Ziegler et al. 2019).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.baselines import bag_of_words_accuracy, length_accuracy
from models.checkpoint import load_model, read_config, read_weights, write_folder
from models.huggingface import from_huggingface, to_huggingface, write_config
from models.intervals import wilson
from models.job import Job
from models.optim import Optimizer, learning_rate
from models.tokenizer import Tokenizer
from models.training import Training, TrainingOptions, batches, torch_generator
from models.transformer import Layout, Transformer, packed_layout


@dataclass(frozen=True)
class RewardOptions(TrainingOptions):
    """Section `reward` of params.yaml. A step sees batch_size prompts with all their rated answers."""

    epochs: int = 2
    batch_size: int = 8
    learning_rate: float = 6e-4
    warmup_steps: int = 10
    weight_decay: float = 0.1
    pair_weight: float = 1.0
    thumb_weight: float = 1.0
    clip_norm: float = 1.0
    checkpoint_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("epochs", "batch_size")
        if self.pair_weight < 0 or self.thumb_weight < 0 or self.pair_weight + self.thumb_weight == 0:
            raise ValueError("pair_weight and thumb_weight must not be negative, and one must be above 0")


class RewardModel(nn.Module):
    """A decoder whose output layer is one number r. The same network is PPO's critic at its start.

    The probability of a thumb up is σ(scale·(r + offset)): scale is 1 while it learns, and keeps what normalise divides by.
    """

    scale: Tensor

    def __init__(self, trunk: Transformer) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.hidden_size, 1)
        self.offset = nn.Parameter(torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def initialize(self, generator: torch.Generator) -> RewardModel:
        """Head normal(0, 1/sqrt(d + 1)), bias 0 (Stiennon et al. 2020)."""
        with torch.no_grad():
            self.head.weight.normal_(0.0, (self.head.in_features + 1) ** -0.5, generator=generator)
            self.head.bias.zero_()
        return self

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """The head's reading after every token: tokens [N] → [N]."""
        return self.head(self.trunk(tokens, layout))[:, 0].float()

    def scores(self, tokens: Tensor, layout: Layout) -> Tensor:
        """r of each sequence, read at its last token: tokens [N] → [B]."""
        return self.head(self.trunk(tokens, layout).index_select(0, layout.last))[:, 0].float()

    def probability(self, scores: Tensor) -> Tensor:
        """The probability of a thumb up for scores r, of any shape."""
        return torch.sigmoid(self.scale * (scores + self.offset))


def lay_out(sequences: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Layout]:
    """Sequences end to end: tokens [N] and their layout."""
    tokens = torch.tensor([t for s in sequences for t in s], device=device)
    return tokens, packed_layout([len(s) for s in sequences], device)


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


@dataclass(frozen=True)
class Rated:
    """One prompt with its rated answers: sequences (prompt and answer ids) and values (+1, −1)."""

    prompt: list[int]
    answers: list[list[int]]
    values: list[int]


def read_opinions(path: Path) -> list[Rated]:
    """Group a snapshot's thumbs by prompt, in the file's order. Raises ValueError that names file, line and field."""
    groups: dict[tuple[int, ...], Rated] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = json.loads(line)
            if row.get("kind") != "thumb":
                continue
            if row.get("value") not in (1, -1) or not row.get("prompt_ids") or not row.get("response_ids"):
                raise ValueError(f"{path}:{number}: a thumb needs value 1 or -1, prompt_ids and response_ids")
            rated = groups.setdefault(tuple(row["prompt_ids"]), Rated(row["prompt_ids"], [], []))
            rated.answers.append(row["response_ids"])
            rated.values.append(row["value"])
    return list(groups.values())


def pair_loss(scores: Tensor, values: Sequence[int]) -> Tensor | None:
    """Mean of −log σ(r_w − r_l) over all pairs of one prompt's answers (scores [K]); None when every value is equal."""
    v = torch.tensor(values, device=scores.device)
    better = v[:, None] > v[None, :]
    if not better.any():
        return None
    return F.softplus(-(scores[:, None] - scores[None, :])[better]).mean()


def thumb_loss(scores: Tensor, values: Tensor, offset: Tensor) -> Tensor:
    """Mean of −log σ(v·(r + b)): scores [n], values [n] of ±1."""
    return F.softplus(-values * (scores + offset)).mean()


def batch_loss(model: RewardModel, batch: Sequence[Rated], options: RewardOptions) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch of prompts, one forward pass an answer, and its parts."""
    device = model.head.weight.device
    sequences = [[*rated.prompt, *answer] for rated in batch for answer in rated.answers]
    scores = model.scores(*lay_out(sequences, device))
    values = [v for rated in batch for v in rated.values]
    target = torch.tensor(values, device=device, dtype=torch.float32)
    thumbs = thumb_loss(scores, target, model.offset)
    pairs = []
    for rated, part in zip(batch, scores.split([len(r.answers) for r in batch]), strict=True):
        if (loss := pair_loss(part, rated.values)) is not None:
            pairs.append(loss)
    total = options.thumb_weight * thumbs
    parts = {"thumb_loss": thumbs.item()}
    if pairs and options.pair_weight:
        mean = torch.stack(pairs).mean()
        total = total + options.pair_weight * mean
        parts["pair_loss"] = mean.item()
    parts["accuracy"] = float((((scores + model.offset) > 0) == (target > 0)).float().mean())
    return total, parts


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
    train, heldout = (read_opinions(snapshot / f"opinions.{split}.jsonl") for split in ("train", "heldout"))
    if not train or not heldout:
        raise ValueError(
            f"artifacts/snapshot has {len(train)} rated prompts to learn and {len(heldout)} held out: collect more opinions"
        )
    model = RewardModel(load_model(base)).initialize(torch_generator(job.seed, "reward head")).to(job.device)
    optimizer = Optimizer(model, weight_decay=options.weight_decay)
    per_epoch = math.ceil(len(train) / options.batch_size)
    steps = options.epochs * per_epoch
    training = Training(job, options, steps, {"model": model, "optimizer": optimizer})

    model.train()
    clock, seen = time.perf_counter(), 0
    order: list[Any] = []
    for step in range(training.first, steps):
        # 1. a batch of prompts, each with all its answers
        if not order or step % per_epoch == 0:
            order = batches(len(train), options.batch_size, job.seed, step // per_epoch)
        batch = [train[i] for i in order[step % per_epoch]]
        # 2. loss and gradient
        loss, parts = batch_loss(model, batch, options)
        loss.backward()
        # 3. the step
        rate = learning_rate(step, steps, options.learning_rate, options.warmup_steps, floor=0.0)
        norm, taken = optimizer.step(rate, options.clip_norm)
        training.skipped += not taken
        seen += sum(len(rated.answers) for rated in batch)
        # 4. records
        done = step + 1
        if training.logs(done):
            speed = seen / (time.perf_counter() - clock)
            clock, seen = time.perf_counter(), 0
            row = {"loss": loss.item(), "learning_rate": rate, "gradient_norm": norm, **parts}
            training.log(done, row, {"answers_per_second": speed})
        training.checkpoint(done)

    model.eval()
    normalise(model, score(model, [r.prompt for r in train for _ in r.answers], [a for r in train for a in r.answers]))
    metrics = evaluate(model, train, heldout, tokenizer) | {"skipped_steps": training.skipped}
    card = (
        "# thumbwheel reward model\n\nScores an answer at its last token; mean 0 and variance 1 over the rated answers."
    )
    save_reward_model(model, job.output / "model", tokenizer, card)
    training.finish(metrics)
    return metrics


def evaluate(
    model: RewardModel, train: Sequence[Rated], heldout: Sequence[Rated], tokenizer: Tokenizer
) -> dict[str, float]:
    """Accuracy of sign(r + b) on held-out thumbs with Wilson's 95 % interval, beside majority, length and bag-of-words."""
    prompts = [r.prompt for r in heldout for _ in r.answers]
    answers = [a for r in heldout for a in r.answers]
    values = [v for r in heldout for v in r.values]
    scores = score(model, prompts, answers)
    right = sum((s + model.offset.item() > 0) == (v > 0) for s, v in zip(scores, values, strict=True))
    up = sum(v > 0 for v in values)
    accuracy = wilson(right, len(values))
    by_value: dict[int, list[float]] = defaultdict(list)
    for s, v in zip(scores, values, strict=True):
        by_value[v].append(s)
    learned = [(a, v) for r in train for a, v in zip(r.answers, r.values, strict=True)]
    test = list(zip(answers, values, strict=True))
    return {
        "heldout": len(values),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "majority": max(up, len(values) - up) / len(values),
        "length_baseline": length_accuracy(learned, test),
        "bag_of_words_baseline": bag_of_words_accuracy(learned, test, tokenizer.vocab_size),
        "score_up": sum(by_value[1]) / max(1, len(by_value[1])),
        "score_down": sum(by_value[-1]) / max(1, len(by_value[-1])),
        "rated": len(learned),
        "up_share": sum(v > 0 for _, v in learned) / len(learned),
    }
