"""Sequences end to end: who sees whom, with common beginnings and windows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.layout import _bounds, attend, branched_layout, dense_layout, packed_layout, sight
from models.transformer import Transformer

PROMPTS = [[5, 9, 11], [7, 30]]
ANSWERS = [[[8, 250], [17, 3, 42, 9], [8]], [[100, 101]]]


def test_positions_restart_in_each_packed_sequence() -> None:
    layout = packed_layout([3, 1, 1, 2])
    assert layout.positions.tolist() == [0, 1, 2, 0, 0, 0, 1]
    assert layout.last.tolist() == [2, 3, 4, 6]
    assert [(s.rows, s.length) for s in layout.segments] == [(1, 3), (2, 1), (1, 2)]
    assert (layout.rows, layout.longest) == (4, 3)


def test_answers_go_on_from_their_prompts_positions() -> None:
    layout = branched_layout([3, 2], [[2, 4, 1], [2]])
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 3, 0, 1, 2, 3]
    assert layout.last.tolist() == [4, 8, 9, 13]
    assert (layout.rows, layout.longest) == (4, 7)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_attention_by_its_definition(window: int) -> None:
    """Each token's softmax over what it may see, token by token, in float64."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(14, heads, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    layout = branched_layout([3, 2], [[2, 4, 1], [2]])
    prompt, other = [0, 1, 2], [10, 11]
    before = {3: prompt, 4: [*prompt, 3], 5: prompt, 6: [*prompt, 5], 7: [*prompt, 5, 6], 8: [*prompt, 5, 6, 7]}
    before |= {0: [], 1: [0], 2: [0, 1], 9: prompt, 10: [], 11: [10], 12: other, 13: [*other, 12]}
    out = attend(q, k, v, layout, window)
    for token, earlier in before.items():
        seen = [*earlier, token][-window:] if window else [*earlier, token]
        for head in range(4):
            scores = torch.stack([q[token, head] @ k[s, head // 2] / 8**0.5 for s in seen])
            expected = sum(p * v[s, head // 2] for p, s in zip(scores.softmax(0), seen, strict=True))
            torch.testing.assert_close(out[token, head], expected)


@pytest.mark.parametrize("extra", [{}, {"sliding_window": 3, "sliding_layers": (1,)}], ids=["full", "sliding"])
def test_a_shared_prompt_has_the_values_and_gradients_of_a_repeated_one(
    model: Transformer, extra: dict[str, object]
) -> None:
    net = Transformer(replace(model.config, **extra))
    net.load_state_dict(model.state_dict())
    whole = [prompt + answer for prompt, answers in zip(PROMPTS, ANSWERS, strict=True) for answer in answers]
    apart = packed_layout([len(s) for s in whole])
    upstream = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    expected = net(torch.tensor([t for s in whole for t in s]), apart, apart.last)
    expected.backward(upstream)
    gradients = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    flat = [t for p, answers in zip(PROMPTS, ANSWERS, strict=True) for part in (p, *answers) for t in part]
    shared = branched_layout([3, 2], [[len(a) for a in answers] for answers in ANSWERS])
    got = net(torch.tensor(flat), shared, shared.last)
    got.backward(upstream)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=3e-5, rtol=1e-4, msg=name)


def test_what_the_gpus_kernel_is_told() -> None:
    """Where queries and keys of each sequence begin and end; its causal mask is aligned to the end, as ours is."""
    queries, keys, at = _bounds(packed_layout([2, 2, 3]), torch.device("cpu"))
    assert queries.tolist() == keys.tolist() == [0, 2, 4, 7] and at is None
    queries, keys, at = _bounds(branched_layout([1, 2], [[1, 2], [1, 1]]), torch.device("cpu"))
    assert queries.tolist() == [0, 2, 4, 7, 8]
    assert keys.tolist() == [0, 2, 5, 8, 11]
    assert at is not None and at.tolist() == [0, 1, 0, 2, 3, 4, 5, 6, 4, 5, 7]
    assert sight(2, 5, 0, torch.device("cpu")).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert sight(2, 5, 2, torch.device("cpu")).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_a_sequence_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        packed_layout([3, 0])
    with pytest.raises(ValueError, match=r"a prompt of 2 tokens with answers of \[\]"):
        branched_layout([2], [[]])
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        branched_layout([0], [[1]])
    assert dense_layout(2, 1).last.tolist() == [0, 1]
