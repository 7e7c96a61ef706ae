"""KTO (Ethayarajh et al. 2024): answers with a thumb up shall gain on the policy's average, those with a thumb down lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.job import Job
from models.opinions import Rated
from models.preference import Answers, PreferenceOptions, learn
from models.training import stream
from models.transformer import Transformer


@dataclass(frozen=True)
class KTOOptions(PreferenceOptions):
    """Section `kto` of params.yaml. A step sees batch_size thumbs; more than one, for the estimate of KL is their mean.

    desirable_weight, undesirable_weight: of thumbs up and down; null: as balanced_weights says.
    """

    beta: float = 0.5
    desirable_weight: float | None = None
    undesirable_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, not {self.batch_size}: KL is estimated over a batch")
        for name in ("desirable_weight", "undesirable_weight"):
            weight = getattr(self, name)
            if weight is not None and not weight > 0:
                raise ValueError(f"{name} must be above 0, or null: {weight}")


def kto_loss(ratios: Tensor, values: Tensor, kl: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """w_d·(1 − σ(β·(ratio − KL))) for a thumb up, w_u·(1 − σ(β·(KL − ratio))) for a thumb down: [B] (eq. 8).

    ratios: log π − log π_ref [B]; values: ±1 [B]; kl: a number without gradient; weights: (w_d, w_u).
    """
    desirable = values > 0
    weight = torch.where(desirable, weights[0], weights[1])
    return weight * torch.sigmoid(-values * beta * (ratios - kl))


def kl_of(ratios: Tensor) -> Tensor:
    """KL(π‖π_ref) in nats an answer, from log ratios of answers to other prompts [B]: their mean, 0 at least, detached."""
    return ratios.detach().mean().clamp_min(0.0)


def balanced_weights(ups: int, downs: int) -> tuple[float, float]:
    """(w_d, w_u) with w_d·ups / (w_u·downs) in [1, 4/3], as the paper advises: 1 each where that holds, else one is raised."""
    if not ups or not downs:
        return 1.0, 1.0
    share = ups / downs
    return (max(1.0, 1 / share), max(1.0, 0.75 * share))


class Thumbs:
    """All lone thumbs of the opinions, and for each prompt an answer that was given to another one."""

    def __init__(self, reference: Transformer, opinions: Sequence[Rated], options: KTOOptions, seed: int) -> None:
        self.options = options
        groups = [[(answer, v) for answer, v in zip(r.answers, r.values, strict=True) if v] for r in opinions]
        prompts = [rated.prompt for rated, group in zip(opinions, groups, strict=True) for _ in group]
        answers = [answer for group in groups for answer, _ in group]
        self.values = [v for group in groups for _, v in group]
        sizes = [len(group) for group in groups if group]
        if len(sizes) < 2:
            raise ValueError(
                f"artifacts/snapshot/opinions.train.jsonl has thumbs on answers to {len(sizes)} prompts: KTO needs at least "
                "two. Collect more opinions, or set align.method to dpo, which takes comparisons"
            )
        ups = sum(v > 0 for v in self.values)
        balanced = balanced_weights(ups, len(self.values) - ups)
        given = (options.desirable_weight, options.undesirable_weight)
        self.weights = (given[0] or balanced[0], given[1] or balanced[1])
        room = reference.config.context_length
        foreign = [answers[i] for i in mismatched(sizes, stream(seed, "mismatched"))]
        foreign = [answer[: room - len(prompt) + 1] for prompt, answer in zip(prompts, foreign, strict=True)]
        self.answers = Answers(reference, prompts, answers)
        self.foreign = Answers(reference, prompts, foreign)

    def __len__(self) -> int:
        return len(self.values)

    def loss(self, policy: Transformer, chosen: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of the thumbs `chosen`, KL estimated on the same prompts."""
        beta = self.options.beta
        with torch.no_grad():
            kl = kl_of(self.foreign.log_ratios(policy, chosen))
        ratios = self.answers.log_ratios(policy, chosen)
        values = torch.tensor([self.values[i] for i in chosen], device=ratios.device)
        loss = kto_loss(ratios, values, kl, beta, self.weights).mean()
        rewards = beta * ratios.detach()
        stats = {"kl": kl.item(), "rewards/accuracy": ((rewards > beta * kl) == (values > 0)).float().mean().item()}
        sides = {"rewards/chosen": rewards[values > 0], "rewards/rejected": rewards[values < 0]}
        stats |= {name: side.mean().item() for name, side in sides.items() if len(side)}
        if all(map(len, sides.values())):
            stats["rewards/margins"] = stats["rewards/chosen"] - stats["rewards/rejected"]
        return loss, stats


def mismatched(sizes: Sequence[int], draw: np.random.Generator) -> list[int]:
    """For each of the items of groups laid end to end, the index of an item of another group, drawn evenly."""
    total, start, out = sum(sizes), 0, []
    for size in sizes:
        out += [(start + size + int(step)) % total for step in draw.integers(0, total - size, size)]
        start += size
    return out


def run(job: Job) -> dict[str, Any]:
    """The stage body: SFT model, snapshot → model/, metrics.json, curves.csv."""
    options = job.options("kto", KTOOptions)
    return learn(job, "kto", options, lambda reference, opinions: Thumbs(reference, opinions, options, job.seed))
