"""DPO (Rafailov et al. 2023): of two answers to a prompt, the one that people liked better shall gain on the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from models.job import Job
from models.opinions import Rated
from models.preference import Answers, Parts, PreferenceOptions, Shares, find_pairs, learn
from models.transformer import Transformer


@dataclass(frozen=True)
class DPOOptions(PreferenceOptions):
    """Section `dpo` of params.yaml. A step sees batch_size pairs.

    label_smoothing: the share of pairs that are thought to be the wrong way round (cDPO, Mitchell 2023);
    length_normalised: log ratios count by token, so that a long answer weighs no more than a short one (Lambert et al. 2024);
    chosen_coefficient: of −log π of the chosen answer by token, which keeps the policy from making both answers less likely
    for ones that nobody rated, such as answers without an end (Pang et al. 2024).
    """

    label_smoothing: float = 0.0
    length_normalised: bool = False
    chosen_coefficient: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and below 0.5, not {self.label_smoothing}")
        if self.chosen_coefficient < 0:
            raise ValueError(f"chosen_coefficient must not be negative: {self.chosen_coefficient}")


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−(1 − ε)·log σ(β·Δ) − ε·log σ(−β·Δ) with Δ the chosen answer's log ratio less the rejected one's: [pairs] each.

    Rafailov et al. 2023, eq. 7; ε of cDPO.
    """
    z = beta * (chosen - rejected)
    return (1 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)


class Comparisons:
    """All pairs of the opinions; an answer that is in several is asked of the reference once."""

    def __init__(self, reference: Transformer, opinions: Sequence[Rated], options: DPOOptions) -> None:
        self.options = options
        prompts, answers, self.pairs = find_pairs(opinions)
        if not self.pairs:
            raise ValueError(
                "artifacts/snapshot/opinions.train.jsonl holds no pair: DPO needs a prompt with an answer that people liked "
                "and one that they did not. Collect more opinions, or set align.method to kto, which takes lone thumbs"
            )
        self.answers = Answers(reference, prompts, answers)

    def __len__(self) -> int:
        return len(self.pairs)

    def tokens(self, element: int) -> int:
        """Tokens of a pair: both answers, their prompt once."""
        better, worse = self.pairs[element]
        return self.answers.tokens(better) + len(self.answers.answers[worse])

    def losses(self, policy: Transformer, chosen: Sequence[int], parts: Parts) -> Iterator[tuple[Tensor, Shares]]:
        """Each part's share of the mean loss of the pairs `chosen`. A pair is one pass over its prompt and its answers."""
        for mine, _ in parts:
            yield self.loss(policy, mine, len(chosen))

    def loss(self, policy: Transformer, mine: Sequence[int], count: int) -> tuple[Tensor, Shares]:
        """The sum of the loss of the pairs `mine` divided by `count`, and their shares of figures."""
        rows = [answer for i in mine for answer in self.pairs[i]]  # better and worse are neighbours, who share a prompt
        o, logp = self.options, self.answers.logprobs(policy, rows)
        lengths = self.answers.lengths(rows).to(logp.device)
        ratios = logp - self.answers.references(rows).to(logp.device)
        better, worse = (ratios / lengths if o.length_normalised else ratios).view(-1, 2).unbind(1)
        nll = (-logp / lengths)[0::2].sum() / count
        loss = dpo_loss(better, worse, o.beta, o.label_smoothing).sum() / count + o.chosen_coefficient * nll
        shares = {
            "chosen_nll": nll,
            "rewards/chosen": o.beta * better.sum() / count,
            "rewards/rejected": o.beta * worse.sum() / count,
            "rewards/margins": o.beta * (better - worse).sum() / count,
            "rewards/accuracy": (better > worse).sum() / count,
        }
        return loss, shares


def run(job: Job) -> dict[str, Any]:
    """The stage body: SFT model, snapshot → model/, metrics.json, curves.csv."""
    options = job.options("dpo", DPOOptions)
    return learn(job, "dpo", options, lambda reference, opinions: Comparisons(reference, opinions, options))
