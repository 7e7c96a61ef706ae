"""Decoding on a CPU: one token for every row, in numpy.

numpy's calls cost a third of torch's, its products of a few rows run faster, and each row's bits do not depend on how many
rows there are (checked at the start: `heights`), so that rows without a request need not be computed.

Notation: h rows computed, d hidden size, H heads, K key-value heads, g = H/K, D head width, R of them turned by RoPE.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from models.layout import attend, dense_layout
from models.products import PRODUCTS, Precision, Product, numpy_of
from models.rope import tables
from models.sampling import Doubles, Floats, Ints, Sampler, Sampling, Settings
from models.transformer import Block, Transformer

SPAN = 32  # attention looks at a multiple of this many keys: what is masked adds exact zeros, so the bits do not change
LEAST = 64  # keys at least: below, BLAS takes another way to sum over them
CHUNK = 256  # keys summed in one product: above, BLAS would cut the sum differently for different lengths
STEP = 16  # heights are multiples of this


@dataclass(frozen=True)
class Layer:
    """A block's weights as numpy takes them; qk_norm [H + K, D]: the norms' weights by head."""

    attention_norm: Floats
    qkv: Product
    qk_norm: Floats | None
    o: Product
    attention_post_norm: Floats | None
    mlp_norm: Floats
    gate_up: Product
    down: Product
    mlp_post_norm: Floats | None
    rotary: bool
    window: int


def layer_of(block: Block, kind: type[Product], rows: int) -> Layer:
    """Read a block, for products of a kind."""

    def norm(module: torch.nn.RMSNorm | None) -> Floats | None:
        return None if module is None else numpy_of(module.weight)

    a = block.attention

    def linear(module: torch.nn.Linear) -> Product:
        return kind(module.weight, module.bias, rows)

    return Layer(
        numpy_of(block.attention_norm.weight),
        linear(a.qkv),
        None if a.q_norm is None or a.k_norm is None else qk_norm(a.q_norm, a.k_norm, a.heads, a.kv_heads),
        linear(a.o),
        norm(block.attention_post_norm),
        numpy_of(block.mlp_norm.weight),
        linear(block.gate_up),
        linear(block.down),
        norm(block.mlp_post_norm),
        a.rotary,
        a.window,
    )


def qk_norm(q: torch.nn.RMSNorm, k: torch.nn.RMSNorm, heads: int, kv_heads: int) -> Floats:
    """The weights of both norms, by head: [H + K, D]."""
    return np.concatenate((np.tile(numpy_of(q.weight), (heads, 1)), np.tile(numpy_of(k.weight), (kv_heads, 1))))


class CpuDecoder:
    """A model's weights, and the cache and sampling settings of `width` rows of up to `context` tokens."""

    def __init__(self, model: Transformer, width: int, context: int, block: int, precision: Precision = "fp32") -> None:
        """block: prompts read together at most; precision: of the matrix products."""
        c = self.config = model.config
        self.width, self.context = width, span_of(context, -(-context // LEAST) * LEAST)
        kind = PRODUCTS[precision]
        self.layers = [layer_of(block, kind, width) for block in model.layers]
        self.embedding, self.norm = numpy_of(model.embedding.weight), numpy_of(model.norm.weight)
        self.head = kind(model.head_weight, None, width)
        self.turns = torch.complex(*tables(c)).numpy()  # complex64 [positions, 1, R/2]
        heads = (c.num_hidden_layers, width, c.num_key_value_heads)
        self.keys = np.zeros((*heads, c.head_dim, self.context), dtype=np.float32)
        self.values = np.zeros((*heads, self.context, c.head_dim), dtype=np.float32)
        windows = {layer.window for layer in self.layers}
        self.masks = {window: np.full((width, 1, 1, self.context), -np.inf, dtype=np.float32) for window in windows}
        self.tokens = np.zeros(width, dtype=np.int64)
        self.lengths = np.zeros(width, dtype=np.int64)
        self.settings = Settings(width, context)
        self.rows = np.arange(width)
        places = np.arange(width * c.num_key_value_heads * c.head_dim) * self.context
        self.places = places.reshape(width, c.num_key_value_heads, c.head_dim)  # of a row's first key in the flat cache
        self._wide = np.empty((width, 2 * c.intermediate_size), dtype=np.float32)
        self._narrow = np.empty((width, c.intermediate_size), dtype=np.float32)
        self._scores = np.empty(width * c.num_attention_heads * self.context, dtype=np.float32)
        self.sampler = Sampler(max(width, block), c.vocab_size)
        linears = [x for layer in self.layers for x in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        shapes = tuple(sorted({x.shape for x in [*linears, self.head]}))
        self.heights = heights(width, shapes, kind, torch.get_num_threads())

    def read(
        self, tokens: Ints, rows: Sequence[int], lengths: Sequence[int], samplings: Sequence[Sampling]
    ) -> tuple[Ints, Doubles]:
        """Prompts enter rows and get their first tokens: ids and log-probabilities, one a row.

        tokens: [P, T], the prompts of `rows` first, each padded behind its end; what else stands there keeps the shape.
        """
        self.lengths[rows] = lengths
        for row, sampling in zip(rows, samplings, strict=True):
            self.settings.begin(row, sampling)
        place = np.arange(self.context)
        for window, mask in self.masks.items():
            for row, length in zip(rows, lengths, strict=True):
                seen = (place < length) & (place > length - window if window else True)
                mask[row, 0, 0] = np.where(seen, 0, -np.inf)
        last = np.arange(len(tokens)) * tokens.shape[1]
        last[: len(rows)] += np.array(lengths) - 1
        return self._sample(self._read(tokens, rows, last), np.array(rows))

    def end(self, row: int) -> None:
        """The row idles: it computes along, over one key."""
        self.settings.end(row)
        self.lengths[row] = self.tokens[row] = 0

    def move(self, source: int, target: int) -> None:
        """A request changes its row."""
        length = self.lengths[source]
        self.keys[:, target, :, :, :length] = self.keys[:, source, :, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
        for mask in self.masks.values():
            mask[target] = mask[source]
        self.lengths[target], self.tokens[target] = length, self.tokens[source]
        self.settings.move(source, target)
        self.end(source)

    def step(self, height: int) -> tuple[Ints, Doubles]:
        """The next token of the first `height` rows: ids [h] and log-probabilities [h]."""
        return self._sample(self._hidden(height), slice(0, height))

    def _sample(self, hidden: Floats, rows: slice | Ints) -> tuple[Ints, Doubles]:
        """hidden [P, d]: more rows than `rows` are padding, which keeps the product's shape."""
        temperature = self.settings.temperature[rows]
        if (temperature != 1).any():
            hidden[: len(temperature)] /= np.where(temperature > 0, temperature, 1)[:, None]
        self.head(hidden, self.sampler.logits(len(hidden)))
        ids, logprobs = self.sampler.draw(self.settings, rows)
        self.tokens[rows] = ids
        return ids, logprobs

    def _read(self, tokens: Ints, rows: Sequence[int], last: Ints) -> Floats:
        """Prompts [P, T] → [P, d] after the last norm, of the tokens at `last`; the keys and values of `rows` are kept."""
        c, eps = self.config, self.config.rms_norm_eps
        prompts, longest = tokens.shape
        layout = dense_layout(prompts, longest)
        turns = np.tile(self.turns[:longest], (prompts, 1, 1))
        x = self.embedding[tokens.reshape(-1)]
        for i, layer in enumerate(self.layers):
            heads = layer.qkv(normed(x, layer.attention_norm, eps)).reshape(len(x), -1, c.head_dim)
            q, k, v = self._split(layer, heads, turns)
            kept = (t.reshape(prompts, longest, -1, c.head_dim)[: len(rows)] for t in (k, v))
            self.keys[i, rows, :, :, :longest] = next(kept).transpose(0, 2, 3, 1)
            self.values[i, rows, :, :longest] = next(kept).transpose(0, 2, 1, 3)
            found = attend(torch.from_numpy(q), torch.from_numpy(k), torch.from_numpy(v), layout, layer.window)
            y = found.flatten(1).numpy()
            if layer is self.layers[-1]:
                x, y = x[last], y[last]
            x = self._finish(layer, x, y)
        return normed(x, self.norm, eps)

    def _hidden(self, h: int) -> Floats:
        """[h, d] after the last norm, from the rows' last tokens, whose keys and values are added to the cache."""
        c, at, eps = self.config, self.lengths[:h], self.config.rms_norm_eps
        span = span_of(int(at.max()) + 1, self.context)
        for window, mask in self.masks.items():
            mask[self.rows[:h], 0, 0, at] = 0
            if window:
                left = np.flatnonzero(at >= window)
                mask[left, 0, 0, at[left] - window] = -np.inf
        turns = self.turns[at]
        places = self.places[:h] + at[:, None, None]
        x = self.embedding[self.tokens[:h]]
        for i, layer in enumerate(self.layers):
            heads = layer.qkv(normed(x, layer.attention_norm, eps)).reshape(h, -1, c.head_dim)
            q, k, v = self._split(layer, heads, turns)
            self.keys[i].reshape(-1)[places] = k
            self.values[i, self.rows[:h], :, at] = v
            y = self._attend(i, q, self.masks[layer.window][:h, :, :, :span])
            x = self._finish(layer, x, y, self._wide[:h], self._narrow[:h])
        self.lengths[:h] += self.settings.live[:h]
        return normed(x, self.norm, eps)

    def _finish(
        self, layer: Layer, x: Floats, y: Floats, wide: Floats | None = None, narrow: Floats | None = None
    ) -> Floats:
        """x [N, d] and what attention found, y [N, H·D] → the layer's output [N, d], in x. wide, narrow: room for the MLP."""
        eps, half = self.config.rms_norm_eps, self.config.intermediate_size
        y = layer.o(y)
        x += y if layer.attention_post_norm is None else normed(y, layer.attention_post_norm, eps)
        wide = layer.gate_up(normed(x, layer.mlp_norm, eps), wide)
        F.silu(torch.from_numpy(wide[:, :half]), inplace=True)
        y = layer.down(np.multiply(wide[:, :half], wide[:, half:], out=narrow))
        x += y if layer.mlp_post_norm is None else normed(y, layer.mlp_post_norm, eps)
        return x

    def _split(self, layer: Layer, heads: Floats, turns: NDArray[np.complex64]) -> tuple[Floats, Floats, Floats]:
        """Projections [h, H + 2K, D] → normalised and rotated q [h, H, D] and k [h, K, D]; v [h, K, D]."""
        c = self.config
        h, n = c.num_attention_heads, c.num_attention_heads + c.num_key_value_heads
        qk, v = heads[:, :n], heads[:, n:]
        if layer.qk_norm is not None:
            qk = normed(qk, layer.qk_norm, c.rms_norm_eps)
        if layer.rotary:
            qk = self._paired(qk)
            pairs = qk[..., : c.rotary_dim].view(np.complex64)
            pairs *= turns
        return qk[:, :h], qk[:, h:], v

    def _paired(self, heads: Floats) -> Floats:
        """Heads [..., D] with the halves that RoPE turns brought side by side: its pairs become complex numbers."""
        if self.config.interleaved_rope:
            return heads
        turned = self.config.rotary_dim
        out = np.empty(heads.shape, dtype=np.float32)
        pairs = out[..., :turned].view(np.complex64)
        pairs.real, pairs.imag = heads[..., : turned // 2], heads[..., turned // 2 : turned]
        if turned < heads.shape[-1]:
            out[..., turned:] = heads[..., turned:]
        return out

    def _attend(self, layer: int, q: Floats, mask: Floats) -> Floats:
        """q [h, H, D] over the cached keys and values, under mask [h, 1, 1, S]: [h, H·D]."""
        c, h, span = self.config, len(q), mask.shape[-1]
        groups = (h, c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads)
        q = np.multiply(q, c.head_dim**-0.5).reshape(*groups, -1)
        keys, values = self.keys[layer, :h], self.values[layer, :h]
        chunks = [slice(start, min(start + CHUNK, span)) for start in range(0, span, CHUNK)]
        scores = self._scores[: h * c.num_attention_heads * span].reshape(*groups, span)
        for chunk in chunks:
            np.matmul(q, keys[..., chunk], out=scores[..., chunk])
        scores += mask
        torch.softmax(torch.from_numpy(scores), -1, out=torch.from_numpy(scores))
        y = np.matmul(scores[..., chunks[0]], values[:, :, chunks[0]])
        for chunk in chunks[1:]:
            y += np.matmul(scores[..., chunk], values[:, :, chunk])
        return y.reshape(h, -1)


def normed(x: Floats, weight: Floats, eps: float) -> Floats:
    """RMSNorm (Zhang and Sennrich 2019) over the last axis."""
    scale = np.vecdot(x, x)
    scale /= x.shape[-1]
    scale += eps
    np.sqrt(scale, out=scale)
    y: Floats = x / scale[..., None]
    y *= weight
    return y


def span_of(length: int, context: int) -> int:
    """How many keys attention looks at when the longest row has `length`."""
    unit = SPAN if length <= CHUNK else LEAST
    return min(context, max(LEAST, -(-length // unit) * unit))


@functools.cache
def heights(width: int, shapes: tuple[tuple[int, int], ...], kind: type[Product], threads: int) -> tuple[int, ...]:
    """The numbers of rows that may be computed, ascending to `width`: each gives every row the same bits as all rows do.

    shapes: [in, out] of the products. That BLAS rounds a row alike whatever the height is true where it was looked at
    (OpenBLAS, multiples of 16) and promised nowhere, so it is tried out; threads: part of the question.
    """
    found = set(range(STEP, width, STEP))
    draw = torch.Generator().manual_seed(0)
    for inner, outer in shapes if found else ():
        product = kind(torch.randn(outer, inner, generator=draw), None, width)
        x = torch.randn(width, inner, generator=draw).numpy()
        whole = product(x)
        found = {
            h for h in found if all((product(x[part]) == whole[part]).all() for part in (slice(h), slice(-h, None)))
        }
    return (*sorted(found), width)
