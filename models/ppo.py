"""PPO with a KL term against the SFT model, as in Ziegler et al. 2019, Stiennon et al. 2020 and InstructGPT.

A is the number of answer tokens of a minibatch, end to end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.advantages import adapt_kl
from models.checkpoint import load_model, read_config, save_model
from models.compute import PLAIN, ComputeOptions
from models.corpus import Sequences
from models.critic import Critic, ValueHead
from models.distributed import everyone, shard, whole
from models.ema import Average
from models.episodes import Models, Rollout, roll_out, statistics
from models.job import Job
from models.lora import Learned, LoraOptions, save_adapter, what_learns
from models.losses import log_prob_loss
from models.optim import Optimizer, learning_rate
from models.ppo_options import PPOOptions
from models.ptx import add_ptx_gradient, check_ptx
from models.ranks import ALONE, Ranks
from models.reward import load_reward_model
from models.rollout import Flat, flatten
from models.surrogate import policy_losses, ratio_statistics, value_losses
from models.tokenizer import Tokenizer
from models.training import Stateful, Training, stream, torch_generator
from models.transformer import Transformer


@dataclass(frozen=True)
class Batch:
    """Episodes in memory at a time. Tensors [A] of their answer tokens: what was known before the update, and the weight of
    each token in the loss: one over the answer tokens of the whole minibatch, however it is cut and shared."""

    flat: Flat
    logp: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor
    weights: Tensor


def minibatch(rollout: Rollout, chosen: Sequence[int], size: int | None, ranks: Ranks) -> Iterator[Batch]:
    """This process's part of the episodes `chosen`, `size` at a time (all at once for None), those of like lengths together."""
    device = rollout.mask.device
    total = int(rollout.mask[torch.tensor(chosen, device=device)].sum())
    ordered = sorted(chosen, key=lambda i: len(rollout.prompts[i]) + len(rollout.answers[i].ids))
    for part, weight in ranks.cut(ordered, size):
        rows = torch.tensor(part, device=device)
        mask = rollout.mask[rows]
        logp, advantages, values, returns = (
            x[rows][mask] for x in (rollout.logp, rollout.advantages, rollout.values, rollout.returns)
        )
        flat = flatten([rollout.prompts[i] for i in part], [rollout.answers[i].ids for i in part], device)
        yield Batch(flat, logp, advantages, values, returns, torch.full_like(logp, weight / total))


def joined(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The statistics of a minibatch of those of its parts: sums, but for the largest ratio."""
    return {name: (max if name == "policy/ratio_max" else math.fsum)(p[name] for p in parts) for name in parts[0]}


class Updater:
    """The optimizers, and the clipped updates of policy and critic on one rollout."""

    def __init__(
        self, models: Models, options: PPOOptions, tokens: np.ndarray, chats: Sequences, ranks: Ranks = ALONE
    ) -> None:
        self.models, self.options, self.tokens, self.chats = models, options, tokens, chats
        self.ranks = ranks
        self.policy_optimizer = Optimizer(models.policy, betas=(0.9, 0.95), eps=1e-5)
        self.critic_optimizer = Optimizer(models.critic, betas=(0.9, 0.95), eps=1e-5)
        self.average = None if options.ema_decay is None else Average(models.policy, options.ema_decay)
        self.skipped = 0

    def update(self, rollout: Rollout, seed: int, iteration: int) -> dict[str, float]:
        """`epochs` passes over the rollout in shuffled minibatches; returns the statistics of the last.

        `skipped` then says how many of the steps were dropped for a gradient that is not finite.
        """
        o = self.options
        self.skipped = 0
        stats: dict[str, float] = {}
        norm = 0.0
        steps = o.epochs * o.minibatches
        size = o.batch_size // o.minibatches
        for epoch in range(o.epochs):
            order = stream(seed, "minibatches", iteration, epoch).permutation(len(rollout.prompts))
            for part in range(o.minibatches):
                chosen = sorted(order[part * size : (part + 1) * size].tolist())
                step = (iteration * o.epochs + epoch) * o.minibatches + part
                stats, norm = self._step(rollout, chosen, step, o.iterations * steps, seed)
        return joined(everyone(stats)) | {"policy/gradient_norm": norm}

    def _step(
        self, rollout: Rollout, chosen: list[int], step: int, steps: int, seed: int
    ) -> tuple[dict[str, float], float]:
        """One step on a minibatch. Returns this process's part of its statistics, and the policy's gradient norm."""
        o, m = self.options, self.models
        batches = list(minibatch(rollout, chosen, o.micro_batch, self.ranks))
        parts = []
        for batch in batches:
            loss, part = self.policy_loss(batch)
            (loss * self.ranks.size).backward()
            parts.append(part)
        stats = joined(parts)
        if o.ptx_coefficient:
            draw = stream(seed, "ptx", step)
            stats["policy/ptx_loss"] = add_ptx_gradient(m.policy, self.tokens, self.chats, o, draw, self.ranks)
        rate = learning_rate(step, steps, o.learning_rate, o.warmup_steps, shape="linear")
        norm, taken = self.policy_optimizer.step(rate, o.clip_norm)
        self.skipped += not taken
        if taken and self.average is not None:
            self.average.update()

        if isinstance(m.critic, Critic):
            parts = []
            for batch in batches:
                loss = self.value_loss(batch, m.critic(batch.flat.tokens, batch.flat.layout, batch.flat.rows))
                (loss * self.ranks.size).backward()
                parts.append({"critic/loss": loss.item()})
            stats |= joined(parts)
        rate = learning_rate(step, steps, o.critic_learning_rate, o.warmup_steps, shape="linear")
        _, taken = self.critic_optimizer.step(rate, o.clip_norm)
        self.skipped += not taken
        return stats, norm

    def policy_loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The policy's clipped loss on a part of a minibatch, and this part's share of the statistics. When the critic is a
        head on the policy, its loss is in it too, times value_coefficient."""
        o, m, flat = self.options, self.models, batch.flat

        def losses(logp: Tensor, rows: slice) -> Tensor:
            advantages, old = batch.advantages[rows], batch.logp[rows]
            return batch.weights[rows] * policy_losses(logp, old, advantages, o.clip_range, o.dual_clip)

        hidden = m.policy(flat.tokens, flat.layout, flat.rows)
        loss, logp = log_prob_loss(hidden, m.policy.head_weight, flat.targets, losses, o.temperature)
        watched = ratio_statistics(logp, batch.logp, o.clip_range)
        stats = {name: (x if x.dim() == 0 else (x * batch.weights).sum()).item() for name, x in watched.items()}
        stats["policy/loss"] = loss.item()
        if isinstance(m.critic, ValueHead):
            value = self.value_loss(batch, m.critic(hidden))
            stats["critic/loss"] = value.item()
            loss = loss + o.value_coefficient * value
        return loss, stats

    def value_loss(self, batch: Batch, values: Tensor) -> Tensor:
        """The critic's clipped loss on a part of a minibatch."""
        losses = value_losses(values, batch.values, batch.returns, self.options.value_clip_range)
        return (losses * batch.weights).sum()


# -- the stage ---------------------------------------------------------------------------------------------------------


def rehearse(training: Training, updater: Updater, prompts: Sequences) -> None:
    """Try the largest batch that can come: of the policy, of ptx and of the critic. Raises MemoryError with its sizes."""
    o, m, ranks = updater.options, updater.models, updater.ranks
    device = m.policy.embedding.weight.device
    longest = int(np.diff(prompts.offsets).max())
    new = min(o.max_new_tokens, m.policy.config.context_length - longest)
    share = math.ceil(o.batch_size // o.minibatches / ranks.size)
    count = min(o.micro_batch or share, share)
    zeros = torch.zeros(count * new, device=device)
    batch = Batch(flatten([[0] * longest] * count, [[0] * new] * count, device), *[zeros] * 5)

    def largest() -> Tensor:
        if o.ptx_coefficient:
            draw = stream(training.job.seed, "rehearsal")
            add_ptx_gradient(m.policy, updater.tokens, updater.chats, o, draw, ranks)
        loss, _ = updater.policy_loss(batch)
        if not isinstance(m.critic, Critic):
            return loss
        loss.backward()
        return updater.value_loss(batch, m.critic(batch.flat.tokens, batch.flat.layout, batch.flat.rows))

    what = f"ppo: a batch of {count} prompts of {longest} tokens with answers of {new}"
    remedy = "set ppo.micro_batch to fewer episodes, or lower ppo.max_new_tokens, in params.yaml"
    passes = o.epochs * o.minibatches * math.ceil(share / count)
    training.rehearse(nn.ModuleList([m.policy, m.critic]), largest, what, remedy, passes)


def run(job: Job) -> dict[str, Any]:
    """The stage body: SFT model, reward model, prompts and those that people asked → model/, metrics.json, curves.csv."""
    options, lora, ranks = job.options("ppo", PPOOptions), job.options("lora", LoraOptions), job.ranks
    base, folder = job.input("artifacts/sft/model"), job.input("artifacts/tokenize")
    tokenizer = Tokenizer.load(base)
    asked_by_people = Sequences.load(job.input("artifacts/snapshot") / "prompts.npz")
    prompts = Sequences.load(folder / "prompts.train.npz").then(asked_by_people)
    tokens = np.load(folder / "pretrain.train.npy", mmap_mode="r")
    chats = Sequences.load(folder / "sft.train.npz")
    if len(prompts) < options.batch_size:
        raise ValueError(
            f"there are {len(prompts)} prompts, fewer than ppo.batch_size {options.batch_size}: add prompts"
        )
    check_ptx("ppo", options, len(tokens), len(chats), read_config(base).text_window)
    models, parts = prepare(job, options, lora)
    updater = Updater(models, options, tokens, chats, ranks)
    parts |= {"policy_optimizer": updater.policy_optimizer, "critic_optimizer": updater.critic_optimizer}
    if updater.average is not None:
        parts["average"] = updater.average
    training = Training(job, options, options.iterations, parts)
    rehearse(training, updater, prompts)
    beta = training.numbers.get("kl_coefficient", options.kl_coefficient)
    sampler = models.policy if ranks.size == 1 else blank(job, lora)  # whole weights, to sample and score with

    for iteration in range(training.first, options.iterations):
        clock = time.perf_counter()
        # 1. prompts, and answers with their rewards and advantages
        draw = stream(job.seed, "prompts", iteration)
        chosen = draw.choice(len(prompts), options.batch_size, replace=False)
        seeds = draw.integers(2**62, size=options.batch_size).tolist()
        acting = models._replace(policy=whole(models.policy, lambda: sampler))
        asked = [prompts[int(i)] for i in chosen]
        rollout = roll_out(acting, asked, seeds, options, beta, tokenizer.stop_ids, ranks)
        row = statistics(rollout, beta)
        rolled = time.perf_counter() - clock
        # 2. the updates
        row |= updater.update(rollout, job.seed, iteration)
        training.skipped += updater.skipped
        training.computed(flops(models, rollout, options))
        # 3. the KL controller
        if options.kl_target is not None:
            beta = adapt_kl(beta, row["objective/kl"], options.kl_target, options.batch_size, options.kl_horizon)
        # 4. records
        done = iteration + 1
        if training.logs(done):
            seconds = time.perf_counter() - clock
            timing = {"episodes_per_second": options.batch_size / seconds, "rollout_share": rolled / seconds}
            training.log(done, row, timing)
        training.numbers = {"kl_coefficient": beta}
        training.checkpoint(done)

    if updater.average is not None:
        updater.average.apply()
    policy = whole(models.policy, lambda: sampler)
    policy.compute = PLAIN  # what is measured is measured in fp32
    return save(job, policy, tokenizer, training, lora) if ranks.first else {}


def flops(models: Models, rollout: Rollout, options: PPOOptions) -> float:
    """Operations of an iteration: the answers are sampled, then read by policy, reference, reward model and a critic of its
    own (each forward alone, a third of a training step); policy and critic learn from them, `epochs` times."""
    lengths = [len(p) + len(a.ids) for p, a in zip(rollout.prompts, rollout.answers, strict=True)]
    networks = 2 if options.critic == "own" else 1
    return models.policy.config.training_flops(lengths) * ((3 + networks) / 3 + options.epochs * networks)


def blank(job: Job, lora: LoraOptions) -> Transformer:
    """A policy with its updates, as it is at the start of the stage."""
    made = load_model(job.input("artifacts/sft/model"), job.device)
    made.compute = job.options("training", ComputeOptions)
    what_learns(made, lora, torch_generator(job.seed, "lora", "policy"))
    return made


def prepare(job: Job, options: PPOOptions, lora: LoraOptions) -> tuple[Models, dict[str, Stateful]]:
    """The networks, policy and critic shared among the processes, and what of them goes into a checkpoint."""
    base, rewarder = job.input("artifacts/sft/model"), job.input("artifacts/reward/model")
    policy, compute = load_model(base, job.device), job.options("training", ComputeOptions)
    policy.compute = compute
    learned = what_learns(policy, lora, torch_generator(job.seed, "lora", "policy"))
    shard(policy, policy.layers, compute)
    critic: Critic | ValueHead
    if options.critic == "shared":
        critic = ValueHead(policy)
        shard(critic, [], compute)
    else:
        critic = Critic(load_reward_model(rewarder, job.device))
        critic.trunk.compute = compute
        what_learns(critic.trunk, lora, torch_generator(job.seed, "lora", "critic"))  # its head learns in any case
        shard(critic, critic.trunk.layers, compute)
    reference = None if lora.rank else load_model(base, job.device)
    if reference is not None:
        reference.compute = compute  # as the policy, so that their difference is what was learned
    models = Models(policy, critic, reference, load_reward_model(rewarder, job.device))
    return models, {"policy": learned, "critic": Learned(critic) if lora.rank else critic}


def save(
    job: Job, policy: Transformer, tokenizer: Tokenizer, training: Training, lora: LoraOptions
) -> dict[str, float]:
    """Write the stage's output; returns its metrics, means over the last ten points of the curve."""
    options, tail = job.options("ppo", PPOOptions), training.rows[-10:]
    metrics = {
        name.replace("/", "_"): math.fsum(row[name] for row in tail) / len(tail)
        for name in ("reward/score", "objective/kl", "answer/tokens", "answer/ended", "answer/distinct")
    }
    metrics |= {
        "kl_coefficient": training.numbers["kl_coefficient"],
        "episodes": options.iterations * options.batch_size,
        "skipped_steps": training.skipped,
    }
    card = "# thumbwheel PPO model\n\nThe SFT model after PPO against a reward model of people's thumbs."
    save_model(policy, job.output / "model", tokenizer, card)
    if lora.rank:
        save_adapter(policy, job.output / "model" / "adapter", "artifacts/sft/model")
    training.finish(metrics)
    return metrics
