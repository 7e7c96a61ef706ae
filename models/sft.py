"""Supervised fine-tuning: the base model learns to answer, from conversations laid end to end without padding."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import load_model, save_model
from models.compute import PLAIN, ComputeOptions
from models.corpus import Sequences
from models.distributed import shard, sum_over_ranks, whole
from models.job import Job
from models.layout import Layout, packed_layout
from models.lora import LoraOptions, save_adapter, what_learns
from models.losses import cross_entropy
from models.memory import smaller
from models.optim import Optimizer, learning_rate
from models.ranks import ALONE, Ranks
from models.tokenizer import Tokenizer
from models.training import Training, TrainingOptions, batches, torch_generator
from models.transformer import Transformer


@dataclass(frozen=True)
class SFTOptions(TrainingOptions):
    """Section `sft` of params.yaml. A step sees batch_size conversations; steps may span several epochs.

    micro_batch: conversations in memory at a time (of each process), null for all of the step's; the gradient is that of the
    whole batch. written_weight: how often each answer that people wrote themselves counts; 0: not at all.
    """

    steps: int = 380
    batch_size: int = 32
    micro_batch: int | None = None
    learning_rate: float = 1.5e-3
    warmup_steps: int = 20
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    checkpoint_every: int = 50
    log_every: int = 10
    written_weight: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("steps", "batch_size", *(["micro_batch"] if self.micro_batch is not None else []))
        self.not_negative("written_weight")


@dataclass(frozen=True)
class Batch:
    """Conversations end to end: tokens [N], their layout, rows [A] that predict a learned token, targets [A] that token."""

    tokens: Tensor
    layout: Layout
    rows: Tensor
    targets: Tensor


def by_length(data: Sequences, indices: Sequence[int]) -> list[int]:
    """The indices, shortest conversation first."""
    return sorted(indices, key=lambda i: int(data.offsets[i + 1] - data.offsets[i]))


def collate(data: Sequences, indices: Sequence[int], device: str) -> Batch:
    """Lay conversations end to end. Each sequence's last token is left out of the input: it has no successor."""
    tokens: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    lengths = []
    for i in by_length(data, indices):
        ids, mask, start = data[i], data.mask(i), len(tokens)
        tokens += ids[:-1]
        lengths.append(len(ids) - 1)
        for at in range(1, len(ids)):
            if mask[at]:
                rows.append(start + at - 1)
                targets.append(ids[at])
    to = torch.device(device)
    return Batch(
        torch.tensor(tokens, device=to),
        packed_layout(lengths, to),
        torch.tensor(rows, device=to),
        torch.tensor(targets, device=to),
    )


def micro_batches(
    data: Sequences, indices: Sequence[int], size: int | None, device: str, ranks: Ranks = ALONE
) -> Iterator[tuple[Batch, float]]:
    """This process's share of a step's conversations, `size` at a time (all at once for None), those of like lengths together,
    and what their loss weighs (Ranks.cut)."""
    for mine, weight in ranks.cut(by_length(data, indices), size):
        yield collate(data, mine, device), weight


def learned_tokens(data: Sequences, indices: Sequence[int]) -> int:
    """How many tokens of the conversations are in the loss: a first token is never predicted."""
    return sum(int(data.learned[data.offsets[i] + 1 : data.offsets[i + 1]].sum()) for i in indices)


def sft_loss(model: Transformer, batch: Batch, tokens_in_step: int) -> Tensor:
    """Σ nll over the learned tokens / tokens_in_step (the count over the whole step, however it is cut)."""
    hidden = model(batch.tokens, batch.layout, batch.rows)
    weights = torch.full_like(batch.targets, 1.0, dtype=torch.float32) / tokens_in_step
    return cross_entropy(hidden, model.head_weight, batch.targets, weights)


@torch.inference_mode()
def answer_loss(model: Transformer, data: Sequences, device: str, limit: int = 1000) -> float:
    """Mean nll in nats over the learned tokens of the first `limit` conversations."""
    total, count = 0.0, 0
    for start in range(0, min(limit, len(data)), 64):
        batch = collate(data, range(start, min(start + 64, limit, len(data))), device)
        total += float(sft_loss(model, batch, 1))
        count += len(batch.targets)
    return total / count


def run(job: Job) -> dict[str, Any]:
    """The stage body: artifacts/pretrain/model + artifacts/tokenize + artifacts/written → model/, metrics.json, curves.csv."""
    options = job.options("sft", SFTOptions)
    folder = job.input("artifacts/tokenize")
    base = job.input("artifacts/pretrain/model")
    tokenizer, model = Tokenizer.load(base), load_model(base, job.device)
    data, heldout = Sequences.load(folder / "sft.train.npz"), Sequences.load(folder / "sft.heldout.npz")
    written = Sequences.load(job.input("artifacts/written") / "sft.npz")
    data = data.then(written, options.written_weight)
    if not len(data) or not len(heldout):
        raise ValueError(
            f"SFT has {len(data)} conversations to learn and {len(heldout)} held out: each needs at least one"
        )
    if not data.learned.any() or not heldout.learned.any():
        raise ValueError("SFT learns the assistant's words, and there are none: no message has the role assistant")
    lora, ranks, most = job.options("lora", LoraOptions), job.ranks, options.micro_batch
    learned = what_learns(model, lora, torch_generator(job.seed, "lora"))
    model.compute = compute = job.options("training", ComputeOptions)
    shard(model, model.layers, compute)
    optimizer = Optimizer(model, weight_decay=options.weight_decay)
    training = Training(job, options, options.steps, {"model": learned, "optimizer": optimizer})
    model.train()

    lengths = np.diff(data.offsets)
    fullest, parts = training.fullest(lengths.tolist(), options.batch_size, most)
    largest, _ = next(micro_batches(data, fullest, most, job.device, ranks))
    rows = largest.layout.rows
    what = f"sft: {rows} conversations of {len(largest.tokens)} tokens together"
    training.rehearse(model, lambda: sft_loss(model, largest, len(largest.targets)), what, smaller("sft", rows), parts)
    clock, seen = time.perf_counter(), 0
    # 1. the step's conversations
    for step, chosen in batches(len(data), options.batch_size, job.seed, training.first, options.steps):
        # 2. loss on the assistant's tokens, and its gradient: a mean over all of the step's, however it is cut
        count, total = learned_tokens(data, chosen), torch.zeros((), device=job.device)
        for batch, weight in micro_batches(data, chosen, most, job.device, ranks):
            loss = sft_loss(model, batch, count) * weight
            (loss * ranks.size).backward()
            total += loss.detach()
        seen += int(lengths[chosen].sum()) - len(chosen)
        # 3. the step
        rate = learning_rate(step, options.steps, options.learning_rate, options.warmup_steps)
        norm, taken = optimizer.step(rate, options.clip_norm)
        training.skipped += not taken
        training.computed(model.config.training_flops((lengths[chosen] - 1).tolist()))
        # 4. records
        done = step + 1
        if training.logs(done):
            speed = seen / (time.perf_counter() - clock)
            clock, seen = time.perf_counter(), 0
            row = {"loss": sum_over_ranks(total.item()), "learning_rate": rate, "gradient_norm": norm}
            training.log(done, row, {"tokens_per_second": speed})
        training.checkpoint(done)

    def blank() -> Transformer:
        made = load_model(base, job.device)
        what_learns(made, lora, torch_generator(job.seed, "lora"))
        return made

    model = whole(model, blank)
    model.compute = PLAIN  # what is measured is measured in fp32
    if not ranks.first:
        return {}
    nll = answer_loss(model, heldout, job.device)
    metrics = {
        "heldout_loss": nll,
        "heldout_perplexity": math.exp(nll),
        "conversations": len(data),
        "written_conversations": len(written),
        "epochs": options.steps / math.ceil(len(data) / options.batch_size),
        "skipped_steps": training.skipped,
    }
    card = "# thumbwheel SFT model\n\nFine-tuned on conversations; loss on the assistant's tokens and stop token."
    save_model(model, job.output / "model", tokenizer, card)
    if lora.rank:
        save_adapter(model, job.output / "model" / "adapter", "artifacts/pretrain/model")
    training.finish(metrics)
    return metrics
