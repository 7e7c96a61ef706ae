from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.layout import dense_layout, packed_layout
from models.losses import cross_entropy, log_probs
from models.transformer import Transformer

SEQUENCES = [[5, 9, 11, 200], [7], [8, 8, 250, 17, 3, 42, 9], [100, 101]]


def test_packed_sequences_see_only_themselves(model: Transformer) -> None:
    flat = torch.tensor([t for s in SEQUENCES for t in s])
    together = model(flat, packed_layout([len(s) for s in SEQUENCES]))
    alone = torch.cat([model(torch.tensor(s), dense_layout(1, len(s))) for s in SEQUENCES])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


def test_a_token_does_not_see_what_follows(model: Transformer) -> None:
    first = model(torch.tensor([5, 6, 7, 8]), dense_layout(1, 4))
    second = model(torch.tensor([5, 6, 7, 99]), dense_layout(1, 4))
    torch.testing.assert_close(first[:3], second[:3])
    assert not torch.allclose(first[3], second[3])


@pytest.mark.parametrize(
    "extra",
    [{}, {"qk_norm": True, "qkv_bias": True}, {"post_norms": True}, {"sliding_window": 3, "sliding_layers": (1,)}],
    ids=["gqa", "qk_norm", "post_norms", "sliding"],
)
def test_rows_that_are_read_have_the_values_and_gradients_of_a_whole_pass(
    model: Transformer, extra: dict[str, object]
) -> None:
    net = Transformer(replace(model.config, **extra)).initialize(torch.Generator().manual_seed(5))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4) if p.dim() > 1 else p.add_(torch.linspace(-0.3, 0.3, p.shape[0]))
    flat, layout = torch.tensor([t for s in SEQUENCES for t in s]), packed_layout([len(s) for s in SEQUENCES])
    rows = torch.tensor([1, 2, 5, 9, 13])
    upstream = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    expected = net(flat, layout)[rows]
    expected.backward(upstream)
    gradients = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    got = net(flat, layout, rows)
    got.backward(upstream)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=3e-5, rtol=1e-4, msg=name)


def test_attention_by_hand_in_one_head() -> None:
    """A reference written out token by token with loops, in float64, for the same weights."""
    from models.config import ModelConfig

    config = ModelConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, intermediate_size=6,
        max_position_embeddings=8, vocab_size=10,
    )  # fmt: skip
    net = Transformer(config).initialize(torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(20)
    ids = [3, 1, 4]
    x = net.embedding.weight[ids]
    block = net.layers[0]

    def norm(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return v / torch.sqrt((v * v).mean() + 1e-5) * w

    def turn(v: torch.Tensor, place: int) -> torch.Tensor:
        a0, a1 = place * 1.0, place * 10000.0 ** (-0.5)
        c, s = torch.cos(torch.tensor([a0, a1])).double(), torch.sin(torch.tensor([a0, a1])).double()
        return torch.cat([v[:2] * c - v[2:] * s, v[2:] * c + v[:2] * s])

    q, k, v = [], [], []
    for i in range(3):
        whole = block.attention.qkv.weight @ norm(x[i], block.attention_norm.weight)
        q.append(turn(whole[:4], i)), k.append(turn(whole[4:8], i)), v.append(whole[8:])
    rows = []
    for i in range(3):
        weights = torch.softmax(torch.stack([q[i] @ k[j] / 2.0 for j in range(i + 1)]), 0)
        h = x[i] + block.attention.o.weight @ sum(weights[j] * v[j] for j in range(i + 1))
        gate, up = (block.gate_up.weight @ norm(h, block.mlp_norm.weight)).split(6)
        h = h + block.down.weight @ (gate * torch.sigmoid(gate) * up)
        rows.append(norm(h, net.norm.weight))
    out = net(torch.tensor(ids), dense_layout(1, 3))
    torch.testing.assert_close(out, torch.stack(rows), atol=1e-6, rtol=1e-6)


def test_chunked_losses_equal_torch_with_gradients() -> None:
    g = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(1300, 8, generator=g, requires_grad=True),
        torch.randn(20, 8, generator=g, requires_grad=True),
    )
    targets, weights = torch.randint(20, (1300,), generator=g), torch.rand(1300, generator=g)
    upstream = torch.randn(1300, generator=g)
    logp = torch.log_softmax(hidden @ weight.t() / 0.7, -1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((logp * upstream).sum(), (hidden, weight))
    got = log_probs(hidden, weight, targets, 0.7)
    torch.testing.assert_close(got, logp)
    for a, b in zip(torch.autograd.grad((got * upstream).sum(), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    nll = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    expected = torch.autograd.grad((nll * weights).sum() * 3, (hidden, weight))
    loss = cross_entropy(hidden, weight, targets, weights)
    torch.testing.assert_close(loss, (nll * weights).sum())
    for a, b in zip(torch.autograd.grad(loss * 3, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
