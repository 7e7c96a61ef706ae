"""How sequences lie end to end without padding, some with a common beginning, and attention over them.

Notation: N tokens of all sequences end to end, B sequences, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """`rows` neighbours of `length` tokens each, whose attention is computed together.

    begins: (segment, tokens): the one sequence of this segment goes on from the first tokens of that one's.
    """

    rows: int
    length: int
    begins: tuple[int, int] | None = None

    @property
    def seen(self) -> int:
        """Tokens that a sequence's last one sees."""
        return self.length + (self.begins[1] if self.begins else 0)


@dataclass(frozen=True)
class Layout:
    """How N tokens laid end to end group into B sequences.

    longest: tokens of the longest; positions: [N] place of each token in its sequence; last: [B] index of each sequence's
    last token; segments: the same in order.
    """

    longest: int
    positions: Tensor
    last: Tensor
    segments: tuple[Segment, ...]

    @property
    def rows(self) -> int:
        """The number of sequences."""
        return len(self.last)


def dense_layout(rows: int, length: int, device: torch.device | str = "cpu") -> Layout:
    """B = rows sequences of equal length."""
    return packed_layout([length] * rows, device)


def packed_layout(lengths: Sequence[int], device: torch.device | str = "cpu") -> Layout:
    """Sequences of the given lengths, end to end. Neighbours of equal length cost fewer calls than others.

    Raises ValueError for a sequence without tokens.
    """
    runs: list[list[int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1][0] += 1
        else:
            runs.append([1, length])
    return _layout([Segment(rows, length) for rows, length in runs], device)


def branched_layout(
    prompts: Sequence[int], answers: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> Layout:
    """Several answers to each prompt, whose tokens stand there once: prompt, first answer, second …, next prompt, …

    prompts: the length of each; answers: the lengths of each one's answers. The sequences are the answers, B in all: each
    sees its prompt and itself, and its positions go on from the prompt's. Raises ValueError for a prompt without an answer,
    or one of either without tokens.
    """
    segments: list[Segment] = []
    for prompt, lengths in zip(prompts, answers, strict=True):
        if prompt < 1 or not lengths or min(lengths) < 1:
            raise ValueError(f"a prompt of {prompt} tokens with answers of {list(lengths)}: each needs at least one")
        trunk = len(segments)
        segments.append(Segment(1, prompt + lengths[0]))
        segments += [Segment(1, length, (trunk, prompt)) for length in lengths[1:]]
    return _layout(segments, device)


def _layout(segments: Sequence[Segment], device: torch.device | str) -> Layout:
    if min(segment.length for segment in segments) < 1:
        raise ValueError("a sequence needs at least one token")
    sizes = torch.tensor([s.length for s in segments for _ in range(s.rows)])
    before = torch.tensor([s.seen - s.length for s in segments for _ in range(s.rows)])
    ends = sizes.cumsum(0)
    positions = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends - sizes - before, sizes)
    longest = max(segment.seen for segment in segments)
    return Layout(longest, positions.to(device), (ends - 1).to(device), tuple(segments))


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int = 0) -> Tensor:
    """Causal attention of each sequence to itself and what it goes on from: q [N, H, D], k and v [N, K, D] → [N, H, D].

    window: how many tokens each sees at most, itself among them; 0 for all.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _attend_at_once(q, k, v, layout, window)
    sizes = [segment.rows * segment.length for segment in layout.segments]
    qs, ks, vs = (t.split(sizes) for t in (q, k, v))
    parts = []
    for i, segment in enumerate(layout.segments):
        keys, values = ks[i], vs[i]
        if segment.begins:
            at, shared = segment.begins
            keys, values = torch.cat((ks[at][:shared], keys)), torch.cat((vs[at][:shared], values))
        query, keys, values = (
            t.reshape(segment.rows, -1, t.shape[1], t.shape[2]).transpose(1, 2) for t in (qs[i], keys, values)
        )
        mask = None
        if segment.begins or 0 < window < segment.length:
            mask = sight(segment.length, segment.seen, window, q.device)
        y = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def sight(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[queries, keys], true where a token may see another: itself and those before it, with a window the last of them.

    The queries are the last of the keys.
    """
    ago = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    return (ago >= 0) & (ago < window) if window else ago >= 0


def _attend_at_once(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int) -> Tensor:
    """As attend, by one call of the GPU's kernel for sequences of unequal lengths, which wants 16 bits a number."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, at = _bounds(layout, q.device)
    if at is not None:
        k, v = k.index_select(0, at), v.index_select(0, at)
    left = window - 1 if window else -1
    longest = max(segment.length for segment in layout.segments)
    gqa = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, queries, keys, longest, layout.longest, window_size=(left, 0), enable_gqa=gqa)
    assert isinstance(out, Tensor)
    return out


def _bounds(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where each sequence's queries and keys begin and end [B + 1 each], and where the keys' tokens stand (None: in order)."""
    sequences = [(i, s) for i, s in enumerate(layout.segments) for _ in range(s.rows)]
    starts = list(accumulate((s.length for _, s in sequences), initial=0))
    ends = torch.tensor(list(accumulate((s.seen for _, s in sequences), initial=0)), dtype=torch.int32, device=device)
    begins = torch.tensor(starts, dtype=torch.int32, device=device)
    if not any(s.begins for _, s in sequences):
        return begins, ends, None
    first = {segment: start for (segment, _), start in reversed(list(zip(sequences, starts, strict=False)))}
    at: list[int] = []
    for (_, s), start in zip(sequences, starts, strict=False):
        if s.begins:
            at += range(first[s.begins[0]], first[s.begins[0]] + s.begins[1])
        at += range(start, start + s.length)
    return begins, ends, torch.tensor(at, device=device)
