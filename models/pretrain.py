"""Pretraining: next-token prediction on windows of the text stream. The base model completes text."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.base import ModelSection, open_base
from models.checkpoint import load_model, save_model
from models.compute import PLAIN, ComputeOptions
from models.config import ModelConfig
from models.distributed import shard, sum_over_ranks, whole
from models.job import Job
from models.layout import dense_layout
from models.losses import cross_entropy
from models.optim import Optimizer, learning_rate
from models.tokenizer import Tokenizer
from models.training import Training, TrainingOptions, stream, torch_generator, write_curves, write_metrics
from models.transformer import Transformer


@dataclass(frozen=True)
class PretrainOptions(TrainingOptions):
    """Section `pretrain` of params.yaml. A step sees batch_size windows of the model's whole context.

    micro_batch: windows in memory at a time (of each process), null for all of the step's; the gradient is that of the whole
    batch.
    """

    steps: int = 500
    batch_size: int = 8
    micro_batch: int | None = None
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    checkpoint_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("steps", "batch_size", *(["micro_batch"] if self.micro_batch is not None else []))


@torch.inference_mode()
def stream_loss(model: Transformer, tokens: np.ndarray, limit: int | None = None) -> tuple[float, int]:
    """Mean nll in nats a token over a token stream cut into windows (config.text_window), and how many tokens were predicted.

    Raises ValueError when the stream holds no whole window.
    """
    length = model.config.text_window
    windows = (len(tokens) - 1) // length
    windows = windows if limit is None else min(windows, limit)
    if windows < 1:
        raise ValueError(f"held-out text has {len(tokens)} tokens, fewer than a window of {length}: give more text")
    device = model.embedding.weight.device
    total = 0.0
    for start in range(0, windows, 16):
        rows = min(16, windows - start)
        part = torch.from_numpy(tokens[start * length : (start + rows) * length + 1].astype(np.int64)).to(device)
        hidden = model(part[:-1], dense_layout(rows, length, device))
        ones = torch.ones(rows * length, device=device)
        total += float(cross_entropy(hidden, model.head_weight, part[1:], ones))
    return total / (windows * length), windows * length


def run(job: Job) -> dict[str, Any]:
    """The stage body: artifacts/tokenize → model/, metrics.json, curves.csv. Raises ValueError for too little text."""
    options, section = job.options("pretrain", PretrainOptions), job.options("model", ModelSection)
    folder = job.input("artifacts/tokenize")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    tokens = np.load(folder / "pretrain.train.npy", mmap_mode="r")
    heldout = np.load(folder / "pretrain.heldout.npy", mmap_mode="r")
    if section.base:
        return _take_base(job, section, heldout)
    config = ModelConfig.from_options(section.shape(), tokenizer.vocab_size)
    length = config.context_length
    if len(tokens) <= length:
        raise ValueError(
            f"pretraining text has {len(tokens)} tokens, fewer than one context of {length}: give more text"
        )
    ranks, most = job.ranks, options.micro_batch
    model = Transformer(config).initialize(torch_generator(job.seed, "weights")).to(job.device)
    model.compute = compute = job.options("training", ComputeOptions)
    if compute.compile:
        for block in model.layers:
            block.compile(dynamic=False)
    shard(model, model.layers, compute)
    optimizer = Optimizer(model, weight_decay=options.weight_decay)
    training = Training(job, options, options.steps, {"model": model, "optimizer": optimizer})
    model.train()

    def loss_of(windows: Tensor, weight: float) -> Tensor:
        """Σ nll of windows [rows, length + 1] / the tokens of the whole step · weight."""
        layout = dense_layout(len(windows), length, job.device)
        hidden = model(windows[:, :-1].reshape(-1), layout)
        weights = hidden.new_full((len(hidden),), weight / (options.batch_size * length), dtype=torch.float32)
        return cross_entropy(hidden, model.head_weight, windows[:, 1:].reshape(-1), weights)

    cut = [len(mine) for mine, _ in ranks.cut(range(options.batch_size), most)]
    what = f"pretrain: a batch of {cut[0]} windows of {length} tokens"
    remedy = f"set pretrain.micro_batch below {cut[0]}, or the model's sizes lower, in params.yaml"
    blank = torch.zeros((cut[0], length + 1), dtype=torch.long, device=job.device)
    training.rehearse(model, lambda: loss_of(blank, 1.0), what, remedy, len(cut))
    clock, seen = time.perf_counter(), 0
    for step in range(training.first, options.steps):
        # 1. a batch of windows, at places that depend on seed and step alone
        starts = stream(job.seed, "windows", step).integers(0, len(tokens) - length, options.batch_size).tolist()
        # 2. loss and gradient
        total = torch.zeros((), device=job.device)
        for mine, weight in ranks.cut(starts, most):
            rows = np.stack([tokens[s : s + length + 1] for s in mine]).astype(np.int64)
            loss = loss_of(torch.from_numpy(rows).to(job.device), weight)
            (loss * ranks.size).backward()
            total += loss.detach()
        # 3. the step
        rate = learning_rate(step, options.steps, options.learning_rate, options.warmup_steps)
        norm, taken = optimizer.step(rate, options.clip_norm)
        training.skipped += not taken
        training.computed(config.training_flops([length] * options.batch_size))
        seen += options.batch_size * length
        # 4. records
        done = step + 1
        if training.logs(done):
            speed = seen / (time.perf_counter() - clock)
            clock, seen = time.perf_counter(), 0
            row = {"loss": sum_over_ranks(total.item()), "learning_rate": rate, "gradient_norm": norm}
            training.log(done, row, {"tokens_per_second": speed})
        training.checkpoint(done)

    model = whole(model, lambda: Transformer(config).to(job.device))
    if not ranks.first:
        return {}
    model.compute = PLAIN  # what is measured is measured in fp32, by code that need not be compiled anew for it
    with torch.compiler.set_stance("force_eager") if compute.compile else nullcontext():
        nll, _ = stream_loss(model, heldout, limit=256)
    metrics = {
        "heldout_loss": nll,
        "heldout_perplexity": math.exp(nll),
        "parameters": config.parameter_count(),
        "tokens_seen": options.steps * options.batch_size * length,
        "skipped_steps": training.skipped,
    }
    card = "# thumbwheel base model\n\nPretrained from random weights on the workspace's text. It completes; it does not chat."
    save_model(model, job.output / "model", tokenizer, card)
    training.finish(metrics)
    return metrics


def _take_base(job: Job, section: ModelSection, heldout: np.ndarray) -> dict[str, Any]:
    """In place of pretraining: the base of model.base, in fp32, measured on the held-out text."""
    folder = open_base(job.root, section)
    model, tokenizer = load_model(folder, job.device), Tokenizer.load(folder)
    if not job.ranks.first:
        return {}
    nll, _ = stream_loss(model, heldout, limit=256)
    metrics = {"heldout_loss": nll, "heldout_perplexity": math.exp(nll), "parameters": model.config.parameter_count()}
    name = Path(section.base).name
    card = f"# thumbwheel base model\n\nTaken from the folder {name} (hash {section.base_hash}), not pretrained here."
    save_model(model, job.output / "model", tokenizer, card)
    write_curves(job.output, [])
    write_metrics(job.output, metrics)
    return metrics
