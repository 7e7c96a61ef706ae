"""KTO (Ethayarajh et al. 2024): answers with a thumb up shall gain on the policy's average, those with a thumb down lose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.distributed import sum_tensor
from models.job import Job
from models.opinions import Rated
from models.preference import Answers, Parts, PreferenceOptions, Shares, learn
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

    def tokens(self, element: int) -> int:
        """Tokens of a thumb's prompt and answer."""
        return self.answers.tokens(element)

    def losses(self, policy: Transformer, chosen: Sequence[int], parts: Parts) -> Iterator[tuple[Tensor, Shares]]:
        """Each part's share of the mean loss of the thumbs `chosen`, KL estimated on the prompts of all of them."""
        kl = self.kl(policy, parts, len(chosen))
        ups = sum(self.values[i] > 0 for i in chosen)
        for mine, _ in parts:
            yield self.loss(policy, mine, kl, ups, len(chosen) - ups)

    @torch.no_grad()
    def kl(self, policy: Transformer, parts: Parts, count: int) -> Tensor:
        """KL(π‖π_ref) in nats an answer: the mean log ratio of the foreign answers of the whole batch of `count` thumbs, in all
        processes, and 0 at least."""
        own = [weight * self.foreign.log_ratios(policy, mine).sum() for mine, weight in parts]
        return (sum_tensor(torch.stack(own).sum()) / count).clamp_min(0.0)

    def loss(self, policy: Transformer, mine: Sequence[int], kl: Tensor, ups: int, downs: int) -> tuple[Tensor, Shares]:
        """The sum of the loss of the thumbs `mine` divided by their batch's count, which has `ups` and `downs`, and their shares
        of figures."""
        beta, count = self.options.beta, ups + downs
        ratios = self.answers.log_ratios(policy, mine)
        values = torch.tensor([self.values[i] for i in mine], device=ratios.device)
        loss = kto_loss(ratios, values, kl, beta, self.weights).sum() / count
        right = (ratios > kl) == (values > 0)
        shares = {"kl": kl * len(mine) / count, "rewards/accuracy": right.sum() / count}
        if ups:
            shares["rewards/chosen"] = beta * (ratios * (values > 0)).sum() / ups
        if downs:
            shares["rewards/rejected"] = beta * (ratios * (values < 0)).sum() / downs
        if ups and downs:
            shares["rewards/margins"] = shares["rewards/chosen"] - shares["rewards/rejected"]
        return loss, shares


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
