"""PPO's critic: what an answer so far promises to earn, read at every token before the next is chosen."""

from __future__ import annotations

from torch import Tensor, nn

from models.reward import RewardModel
from models.transformer import Layout, Transformer


class Critic(nn.Module):
    """A network of its own that starts as the reward model: its trunk and head, read at every token."""

    def __init__(self, rewarder: RewardModel) -> None:
        super().__init__()
        self.trunk, self.head = rewarder.trunk, rewarder.head

    def forward(self, tokens: Tensor, layout: Layout, rows: Tensor) -> Tensor:
        """Values at the tokens `rows` [A] of tokens [N]: [A] in fp32."""
        return self.head(self.trunk(tokens, layout, rows).to(self.head.weight.dtype))[:, 0].float()


class ValueHead(nn.Module):
    """A head on the policy's own hidden states. It starts at 0 (Ziegler et al. 2019), so that it moves the trunk only once
    it has learned something."""

    def __init__(self, trunk: Transformer) -> None:
        super().__init__()
        weight = trunk.embedding.weight
        self.linear = nn.Linear(trunk.config.hidden_size, 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [A, d] → values [A] in fp32."""
        return self.linear(hidden.to(self.linear.weight.dtype))[:, 0].float()
