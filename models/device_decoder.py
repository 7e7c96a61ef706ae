"""Decoding on an accelerator: one token for every row, in torch, with shapes that never change.

Everything that a step reads and writes lies on the device, so that on CUDA a step is one captured graph and one transfer
of its tokens to the host. The same function runs on a CPU, where the tests hold it against models/cpu_decoder.py. Never run
on a GPU so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.layout import dense_layout
from models.sampling import BLOCK, Doubles, Ints, Sampling
from models.transformer import Block, Transformer


class DeviceDecoder:
    """The cache and sampling settings of `width` rows of up to `context` tokens, beside the model on its device."""

    def __init__(self, model: Transformer, width: int, context: int) -> None:
        c, weight = model.config, model.embedding.weight
        self.model, self.width = model, width
        self.device = weight.device
        shape = (c.num_hidden_layers, width, c.num_key_value_heads, context, c.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=self.device, dtype=weight.dtype) for _ in range(2))

        def of_rows(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((width,), value, device=self.device, dtype=dtype)

        self.tokens, self.lengths, self.made, self.top_k = (of_rows(0, torch.long) for _ in range(4))
        self.temperature, self.top_p = of_rows(1, torch.float32), of_rows(1, torch.float32)
        self.live = of_rows(0, torch.bool)
        self.numbers = torch.zeros(width, context, device=self.device, dtype=torch.float64)
        self.sampled = torch.zeros(2, width, device=self.device, dtype=torch.float64)  # ids, log-probabilities
        self.every = torch.arange(width, device=self.device)
        self.filtered = [False] * width
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def read(
        self, tokens: Ints, rows: Sequence[int], lengths: Sequence[int], samplings: Sequence[Sampling]
    ) -> tuple[Ints, Doubles]:
        """As CpuDecoder.read."""
        prompts, longest = tokens.shape
        last = torch.arange(prompts) * longest
        last[: len(rows)] += torch.tensor(lengths) - 1
        flat, layout = torch.from_numpy(tokens).view(-1).to(self.device), dense_layout(prompts, longest, self.device)
        hidden, cache = self.model.forward_with_cache(flat, layout, last.to(self.device))
        at = torch.tensor(rows, device=self.device)
        for layer, pair in enumerate(cache):
            for store, new in zip((self.keys, self.values), pair, strict=True):
                blocks = new.view(prompts, longest, *new.shape[1:])[: len(rows)]
                store[layer, at, :, :longest] = blocks.transpose(1, 2)
        self.lengths[at] = torch.tensor(lengths, device=self.device)
        for row, s in zip(rows, samplings, strict=True):
            self.temperature[row], self.top_k[row], self.top_p[row] = s.temperature, s.top_k, s.top_p
            self.numbers[row, : len(s.numbers)] = torch.from_numpy(s.numbers).to(self.device)
            self.made[row], self.live[row] = 0, True
            self.filtered[row] = s.filtered
        logits = self.model.logits(hidden)[: len(rows)]
        self._take(at, *self._draw(logits, at, any(s.filtered for s in samplings)))
        return self._sampled(np.array(rows))

    def end(self, row: int) -> None:
        """The row idles: it computes along, over one key."""
        for values, idle in ((self.temperature, 1), (self.top_k, 0), (self.top_p, 1), (self.live, False)):
            values[row] = idle
        for counters in (self.tokens, self.lengths, self.made):
            counters[row] = 0
        self.filtered[row] = False

    def step(self) -> tuple[Ints, Doubles]:
        """The next token of every row: ids and log-probabilities [width]."""
        filtered = any(self.filtered)
        if self.device.type != "cuda":
            self.advance(filtered)
        else:
            if filtered not in self.graphs:
                self.graphs[filtered] = self._capture(filtered)
            self.graphs[filtered].replay()
        return self._sampled(slice(None))

    def _sampled(self, rows: slice | Ints) -> tuple[Ints, Doubles]:
        """The one transfer of a step."""
        ids, logprobs = self.sampled.cpu().numpy()
        return ids[rows].astype(np.int64), logprobs[rows].copy()

    def _capture(self, filtered: bool) -> torch.cuda.CUDAGraph:
        """Record a step. It runs first on a stream of its own, as capturing asks; what that changed is put back. Keys written
        beyond a row's length are written anew before anything sees them."""
        counters = (self.tokens, self.lengths, self.made)
        before = [counter.clone() for counter in counters]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.advance(filtered)
        torch.cuda.current_stream().wait_stream(stream)
        for counter, value in zip(counters, before, strict=True):
            counter.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.advance(filtered)
        return graph

    def advance(self, filtered: bool) -> None:
        """A step of all rows, in place: shapes and addresses are the same every time, and nothing waits for the host."""
        model, at = self.model, self.lengths.clamp_max(self.keys.shape[3] - 1)
        x = model.embedding(self.tokens)
        cos, sin = model.cos[at].to(x.dtype), model.sin[at].to(x.dtype)
        for layer, block in enumerate(model.layers):
            x = self._block(layer, block, x, at, cos, sin)
        self.lengths += self.live
        self._take(self.every, *self._draw(model.logits(model.norm(x)), self.every, filtered))

    def _block(self, layer: int, block: Block, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a = block.attention
        q, k, v = a.split(a.qkv(block.attention_norm(x)), cos, sin)
        self.keys[layer, self.every, :, at] = k
        self.values[layer, self.every, :, at] = v
        place = torch.arange(self.keys.shape[3], device=self.device)
        seen = place <= at[:, None]
        if a.window:
            seen &= place > at[:, None] - a.window
        # the query heads of one key head stand where SDPA has the queries of a sequence
        q = q.reshape(self.width, a.kv_heads, -1, a.head_dim)
        y = F.scaled_dot_product_attention(q, self.keys[layer], self.values[layer], attn_mask=seen[:, None, None])
        y = a.o(y.reshape(self.width, -1))
        x = x + (y if block.attention_post_norm is None else block.attention_post_norm(y))
        y = block.mlp(x)
        return x + (y if block.mlp_post_norm is None else block.mlp_post_norm(y))

    def _draw(self, logits: Tensor, rows: Tensor, filtered: bool) -> tuple[Tensor, Tensor]:
        """Sample rows from logits [rows, V]: ids and log-probabilities, by the method of models/sampling.py."""
        temperature, numbers = self.temperature[rows], self.numbers[rows, self.made[rows]]
        greedy = temperature == 0
        logp = torch.log_softmax(logits.float() / temperature.masked_fill(greedy, 1.0)[:, None], dim=-1)
        best = logp.argmax(-1)
        if filtered:
            logp = keep_top(logp, self.top_k[rows], self.top_p[rows])
        ids = invert(logp.exp(), numbers)
        chosen = logp.gather(1, ids[:, None])[:, 0]
        return torch.where(greedy, best, ids), chosen.masked_fill(greedy, 0.0)

    def _take(self, rows: Tensor, ids: Tensor, logprobs: Tensor) -> None:
        self.sampled[0, rows], self.sampled[1, rows] = ids.double(), logprobs.double()
        self.tokens[rows] = ids
        self.made[rows] += self.live[rows]


def invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """The token where the cumulative weight passes number · total: weights [rows, V], numbers [rows] in [0, 1) → [rows]."""
    count, vocabulary = weights.shape
    blocks = F.pad(weights, (0, -vocabulary % BLOCK)).view(count, -1, BLOCK)
    edges = blocks.sum(2, dtype=torch.float64).cumsum(1)
    total = edges[:, -1:]
    target = torch.minimum(numbers[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    block = (edges <= target).sum(1, keepdim=True)
    rest = target - F.pad(edges, (1, 0)).gather(1, block)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    at = (within.cumsum(1, dtype=torch.float64) <= rest).sum(1)
    last = BLOCK - 1 - (within.flip(1) > 0).int().argmax(1)  # the block's last token that can be drawn
    return block[:, 0] * BLOCK + torch.minimum(at, last)


def keep_top(logp: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """models.sampling.keep_top for log-probabilities [rows, V]; 0 and 1 switch the filters off by row. Renormalised."""
    ordered, order = logp.sort(dim=-1, descending=True, stable=True)
    vocabulary = logp.shape[1]
    rank = torch.arange(vocabulary, device=logp.device)
    kept = rank < torch.where(top_k > 0, top_k, vocabulary)[:, None]
    p = ordered.exp().double() * kept
    cumulative = p.cumsum(1)
    before = cumulative - p
    kept &= (before < top_p[:, None] * cumulative[:, -1:]) | (rank == 0)
    ordered = torch.log_softmax(ordered.masked_fill(~kept, float("-inf")), dim=-1)
    return torch.empty_like(logp).scatter_(1, order, ordered)
