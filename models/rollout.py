"""Generation: continuous batching over a fixed number of slots, one random stream a request, and scoring of given answers.

Every decode step runs at the same width whatever the load, and prompts are read in blocks of one shape, so a request's
text depends on its prompt, sampling settings and seed, not on its batch mates (promised per width, device kind and thread
count).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.layout import Layout, dense_layout, packed_layout
from models.losses import log_probs
from models.transformer import Block, Transformer

SPAN = 32  # attention looks at this many keys or a multiple: what is masked adds exact zeros, so the bits do not change
PREFILL_ROWS = 8  # prompts read together: enough rows for a matrix product to run near its peak


@dataclass(frozen=True)
class Request:
    """What to continue and how. top_k = 0 and top_p = 1 switch those filters off; temperature 0 is greedy."""

    id: str
    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Token:
    """One sampled token. logprob is of the distribution that was sampled; finish_reason is None until the last."""

    request_id: str
    id: int
    logprob: float
    finish_reason: str | None


@dataclass(frozen=True)
class Answer:
    """A finished continuation: ids (with the stop token when it was sampled), their log-probabilities, why it ended."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: str


class _Slot:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.draws = np.random.Generator(np.random.Philox(request.seed)).random(request.max_new_tokens)
        self.made = 0


class Engine:
    """Slots for `width` requests: finished rows leave, waiting prompts enter.

    stop_id: the token, or the tokens, that end an answer. context: prompt and answer together, when the cache should
    hold less than the model's whole context (it takes 2 · layers · width · context · K · D numbers).
    """

    def __init__(
        self, model: Transformer, *, stop_id: int | Collection[int], width: int = 32, context: int | None = None
    ) -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        self.stop_ids = frozenset([stop_id] if isinstance(stop_id, int) else stop_id)
        self.model, self.width = model.eval(), width
        c = model.config
        self.context = min(context or c.context_length, c.context_length)
        device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
        shape = (c.num_hidden_layers, width, c.num_key_value_heads, self.context, c.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.tokens = torch.zeros(width, dtype=torch.long)
        self.lengths = torch.zeros(width, dtype=torch.long)
        self.slots: list[_Slot | None] = [None] * width
        self.waiting: deque[Request] = deque()
        self.device = device
        self.weights = _transposed(model)

    @property
    def busy(self) -> bool:
        """Whether any request waits or is under way."""
        return bool(self.waiting) or any(self.slots)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ValueError when its prompt is empty or leaves no room in the context."""
        if not 1 <= len(request.prompt) < self.context:
            raise ValueError(f"the prompt has {len(request.prompt)} tokens; 1 to {self.context - 1} fit the context")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {request.max_new_tokens}")
        self.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request, waiting or under way."""
        self.waiting = deque(r for r in self.waiting if r.id != request_id)
        self.slots = [None if s and s.request.id == request_id else s for s in self.slots]

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Admit waiting prompts into free slots, then sample one token for every request under way."""
        out = []
        while self.waiting and self.slots.count(None) >= min(PREFILL_ROWS, self.width, len(self.waiting)):
            out += self._admit()  # under load a whole block at a time; a lone prompt at once
        if any(self.slots):
            out += self._sample(self._decode(), [row for row, slot in enumerate(self.slots) if slot])
        return out

    def _admit(self) -> list[Token]:
        """Read up to PREFILL_ROWS waiting prompts of one length class into free slots, and sample their first tokens.

        The block has the same shape however many there are; what pads it comes after, so no prompt sees it.
        """
        longest = _round_up(len(self.waiting[0].prompt), self.context)
        free = [row for row, slot in enumerate(self.slots) if slot is None][:PREFILL_ROWS]
        chosen: list[Request] = []
        while self.waiting and len(chosen) < len(free):
            if _round_up(len(self.waiting[0].prompt), self.context) != longest:
                break
            chosen.append(self.waiting.popleft())
        block = torch.zeros(PREFILL_ROWS, longest, dtype=torch.long)
        for i, request in enumerate(chosen):
            block[i, : len(request.prompt)] = torch.tensor(request.prompt)
        tokens = block.view(-1).to(self.device)
        hidden, cache = self.model.forward_with_cache(tokens, dense_layout(PREFILL_ROWS, longest, self.device))
        rows = free[: len(chosen)]
        for layer, (k, v) in enumerate(cache):
            for store, new in ((self.keys, k), (self.values, v)):
                blocks = new.view(PREFILL_ROWS, longest, *new.shape[1:]).transpose(1, 2)
                store[layer, rows, :, :longest] = blocks[: len(chosen)]
        for row, request in zip(rows, chosen, strict=True):
            self.slots[row], self.lengths[row] = _Slot(request), len(request.prompt)
        last = torch.arange(PREFILL_ROWS) * longest
        last[: len(chosen)] += torch.tensor([len(request.prompt) - 1 for request in chosen])
        logits = self.model.logits(hidden[last.to(self.device)])
        return self._sample(logits[: len(chosen)], rows, first=True)

    def _decode(self) -> Tensor:
        """One step at full width: [width] tokens → logits [width, V]. Idle rows compute and are ignored."""
        at = self.lengths.to(self.device)
        span = _round_up(int(self.lengths.max()) + 1, self.context)
        x = self.model.embedding(self.tokens.to(self.device))
        cos, sin = self.model.cos[at].to(x.dtype), self.model.sin[at].to(x.dtype)
        blocks = self.model.layers
        masks = {w: _mask(at, span, w, x.dtype) for w in {block.attention.window for block in blocks}}
        rows = torch.arange(self.width, device=self.device)
        for layer, block in enumerate(blocks):
            x = self._decode_block(block, layer, x, cos, sin, masks[block.attention.window], rows, at)
        self.lengths += torch.tensor([slot is not None for slot in self.slots])
        return self.model.norm(x) @ self.weights[-1][0]

    def _decode_block(
        self, block: Block, layer: int, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, rows: Tensor, at: Tensor
    ) -> Tensor:
        a, w = block.attention, self.weights[layer]
        q, k, v = a.split(_linear(block.attention_norm(x), w[0], a.qkv.bias), cos, sin)
        self.keys[layer, rows, :, at] = k
        self.values[layer, rows, :, at] = v
        q = q.reshape(self.width, a.kv_heads, a.heads // a.kv_heads, a.head_dim)
        span = mask.shape[-1]
        scores = q @ self.keys[layer, :, :, :span].transpose(-1, -2) * a.head_dim**-0.5 + mask
        y = (scores.softmax(-1) @ self.values[layer, :, :, :span]).reshape(self.width, -1)
        y = _linear(y, w[1], a.o.bias)
        x = x + (y if block.attention_post_norm is None else block.attention_post_norm(y))
        gate, up = _linear(block.mlp_norm(x), w[2], block.gate_up.bias).chunk(2, dim=-1)
        y = _linear(F.silu(gate) * up, w[3], block.down.bias)
        return x + (y if block.mlp_post_norm is None else block.mlp_post_norm(y))

    def _sample(self, logits: Tensor, rows: list[int], first: bool = False) -> list[Token]:
        """Sample for the given rows (of full-width logits, or of just these rows when first) and free what has ended."""
        live = [(row, slot) for row in rows if (slot := self.slots[row])]
        if not first and len(rows) < self.width:
            logits = logits[rows]
        ids, logprobs = _draw(logits, [slot for _, slot in live])
        out = []
        for (row, slot), id, logprob in zip(live, ids, logprobs, strict=True):
            slot.made += 1
            room = self.context - len(slot.request.prompt) - slot.made
            reason = "stop" if id in self.stop_ids else None
            if reason is None and (slot.made >= slot.request.max_new_tokens or room < 1):
                reason = "length"
            self.tokens[row] = id
            if reason:
                self.slots[row] = None
                self.lengths[row] = 0
            out.append(Token(slot.request.id, id, logprob, reason))
        return out


def _round_up(length: int, context: int) -> int:
    """The next multiple of SPAN, or the context where that is shorter."""
    return min(context, -(-length // SPAN) * SPAN)


def _mask(at: Tensor, span: int, window: int, dtype: torch.dtype) -> Tensor:
    """[width, 1, 1, span]: 0 for the keys that the token at place `at` [width] sees, −inf for others.

    It sees itself and those before it; with a window, that many in all.
    """
    place = torch.arange(span, device=at.device)[None, :]
    unseen = place > at[:, None]
    if window:
        unseen |= place <= at[:, None] - window
    mask = torch.zeros(unseen.shape, device=at.device, dtype=dtype).masked_fill_(unseen, float("-inf"))
    return mask[:, None, None]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in] · weight [in, out] + bias."""
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _transposed(model: Transformer) -> list[list[Tensor]]:
    """Weights as [in, out], made once a rollout: several rows times [in, out] runs faster on a CPU than [out, in]."""
    layers = [[b.attention.qkv, b.attention.o, b.gate_up, b.down] for b in model.layers]
    out = [[linear.weight.detach().t().contiguous() for linear in layer] for layer in layers]
    return [*out, [model.head_weight.detach().t().contiguous()]]


def _draw(logits: Tensor, slots: Sequence[_Slot]) -> tuple[list[int], list[float]]:
    """Inverse-CDF sampling with each request's own number: logits [rows, V] → ids and log-probabilities."""
    requests = [slot.request for slot in slots]
    temperature = torch.tensor([r.temperature for r in requests], device=logits.device)
    greedy = temperature == 0
    logp = torch.log_softmax(logits.float() / temperature.masked_fill(greedy, 1.0)[:, None], dim=-1)
    if any(r.top_k or r.top_p < 1 for r in requests):
        logp = torch.stack([_filter(row, r) for row, r in zip(logp, requests, strict=True)])
    cumulative = logp.exp().cumsum(-1, dtype=torch.float64)
    numbers = torch.tensor([slot.draws[slot.made] for slot in slots], device=logits.device, dtype=torch.float64)
    ids = torch.searchsorted(cumulative, (numbers * cumulative[:, -1])[:, None], right=True)[:, 0]
    ids = ids.clamp_max(logits.shape[-1] - 1)
    if greedy.any():
        ids = torch.where(greedy, logp.argmax(-1), ids)
    chosen = logp.gather(1, ids[:, None])[:, 0].masked_fill(greedy, 0.0)
    return ids.tolist(), chosen.tolist()


def _filter(logp: Tensor, request: Request) -> Tensor:
    """Keep the top_k and the smallest set that holds top_p of the probability (Holtzman et al. 2020); renormalise."""
    ordered, order = logp.sort(descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if request.top_k:
        keep[request.top_k :] = False
    if request.top_p < 1:
        before = ordered.exp().cumsum(0) - ordered.exp()
        keep &= before < request.top_p
    out = torch.full_like(logp, float("-inf"))
    out[order[keep]] = ordered[keep]
    return torch.log_softmax(out, dim=-1)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    stop_id: int | Collection[int],
    max_new_tokens: int,
    seeds: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    width: int = 64,
) -> list[Answer]:
    """Continue every prompt, `width` at a time; seeds[i] drives prompt i. Raises ValueError as Engine.submit does."""
    longest = max((len(prompt) for prompt in prompts), default=1) + max_new_tokens
    context = _round_up(longest, model.config.context_length)
    engine = Engine(model, stop_id=stop_id, width=width, context=context)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        engine.submit(Request(str(i), prompt, max_new_tokens, temperature, top_p, top_k, seed))
    tokens: list[list[Token]] = [[] for _ in prompts]
    while engine.busy:
        for token in engine.step():
            tokens[int(token.request_id)].append(token)
    return [Answer([t.id for t in ts], [t.logprob for t in ts], ts[-1].finish_reason or "") for ts in tokens]


@torch.inference_mode()
def sequence_logprobs(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    tokens_per_batch: int = 4096,
) -> list[list[float]]:
    """log π(answer token | prompt, earlier answer tokens) for every answer token; nothing is sampled.

    prompts and answers: ids, each not empty. Returns one list an answer. Raises ValueError past the context length.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    out: list[list[float]] = [[] for _ in prompts]
    device = model.embedding.weight.device
    start = 0
    while start < len(order):
        stop, longest = start, 0
        while stop < len(order):
            longest = max(longest, len(prompts[order[stop]]) + len(answers[order[stop]]))
            if stop > start and longest * (stop - start + 1) > tokens_per_batch:
                break
            stop += 1
        batch = order[start:stop]
        flat = flatten([prompts[i] for i in batch], [answers[i] for i in batch], device)
        hidden = model(flat.tokens, flat.layout)[flat.rows]
        values = log_probs(hidden, model.head_weight, flat.targets, temperature).tolist()
        at = 0
        for i in batch:
            out[i] = values[at : at + len(answers[i])]
            at += len(answers[i])
        start = stop
    return out


@dataclass(frozen=True)
class Flat:
    """Prompts and answers end to end: tokens [N] (each answer's last token has no successor and is left out of the
    input), rows [A] where an answer token is predicted, targets [A] that token."""

    tokens: Tensor
    layout: Layout
    rows: Tensor
    targets: Tensor


def flatten(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], device: torch.device | str) -> Flat:
    """Lay prompts with their answers end to end, for one forward pass that predicts every answer token."""
    tokens: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    lengths = []
    for prompt, answer in zip(prompts, answers, strict=True):
        start = len(tokens) + len(prompt) - 1
        tokens += prompt
        tokens += answer[:-1]
        rows += range(start, start + len(answer))
        targets += answer
        lengths.append(len(prompt) + len(answer) - 1)
    to = torch.device(device)
    return Flat(
        torch.tensor(tokens, device=to),
        packed_layout(lengths, to),
        torch.tensor(rows, device=to),
        torch.tensor(targets, device=to),
    )
