"""PPO-ptx (InstructGPT, eq. 2): the gradient of language modelling beside that of a policy's own loss, so that it does not
forget how to speak. Used by PPO, DPO and KTO alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.corpus import Sequences
from models.layout import dense_layout
from models.losses import cross_entropy
from models.ranks import ALONE, Ranks
from models.sft import by_length, collate, learned_tokens
from models.training import TrainingOptions
from models.transformer import Transformer


@dataclass(frozen=True)
class PtxOptions(TrainingOptions):
    """ptx_coefficient: γ; ptx_batch_size: windows of pretraining text a step; ptx_conversations: SFT conversations a step."""

    ptx_coefficient: float = 0.2
    ptx_batch_size: int = 2
    ptx_conversations: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        self.not_negative("ptx_coefficient", "ptx_batch_size", "ptx_conversations")


def check_ptx(section: str, options: PtxOptions, tokens: int, conversations: int, window: int) -> None:
    """Raises ValueError, with the section's name, when there is less text to keep in mind than one draw takes."""
    if not options.ptx_coefficient:
        return
    if options.ptx_batch_size and tokens <= window:
        raise ValueError(
            f"{section}.ptx_batch_size draws windows of {window + 1} tokens of pretraining text, there are {tokens}: "
            "set it to 0"
        )
    if options.ptx_conversations and not conversations:
        raise ValueError(f"{section}.ptx_conversations draws SFT conversations, there are none: set it to 0")


def add_ptx_gradient(
    policy: Transformer,
    tokens: np.ndarray,
    chats: Sequences,
    options: PtxOptions,
    draw: np.random.Generator,
    ranks: Ranks = ALONE,
) -> float:
    """Add γ·gradient of the language-modelling loss on drawn windows and conversations to the gradient that is there.

    tokens: the pretraining text [tokens]. Each process takes its part of what all draw. Returns the loss of this part, which
    sums over the processes to the whole.
    """
    device, length = policy.embedding.weight.device, policy.config.text_window
    total = 0.0

    def add(hidden: Tensor, targets: Tensor, count: int, weight: float) -> float:
        weights = torch.full(targets.shape, weight / count, device=device)
        loss = cross_entropy(hidden, policy.head_weight, targets, weights)
        (options.ptx_coefficient * ranks.size * loss).backward()
        return loss.item()

    if options.ptx_batch_size:
        starts = draw.integers(0, len(tokens) - length, options.ptx_batch_size).tolist()
        for mine, weight in ranks.cut(starts):
            ids = torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in mine]).astype(np.int64)).to(device)
            hidden = policy(ids[:, :-1].reshape(-1), dense_layout(len(mine), length, device))
            total += add(hidden, ids[:, 1:].reshape(-1), options.ptx_batch_size * length, weight)
    if options.ptx_conversations:
        chosen = draw.integers(0, len(chats), options.ptx_conversations).tolist()
        for mine, weight in ranks.cut(by_length(chats, chosen)):
            batch = collate(chats, mine, str(device))
            hidden = policy(batch.tokens, batch.layout, batch.rows)
            total += add(hidden, batch.targets, learned_tokens(chats, chosen), weight)
    return total
