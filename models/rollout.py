"""Generation: continuous batching over a fixed number of slots, one random stream a request, and scoring of given answers.

Prompts are read in blocks of one shape, and the decoders (models/cpu_decoder.py, models/device_decoder.py) give a row the
same bits whatever else they compute, so a request's text depends on its prompt, sampling settings and seed, not on its
batch mates (promised per width, device kind and thread count).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.cpu_decoder import SPAN, CpuDecoder
from models.device_decoder import DeviceDecoder
from models.layout import Layout, packed_layout
from models.losses import log_probs
from models.products import PRODUCTS, Precision
from models.sampling import Doubles, Ints, Sampling
from models.transformer import Transformer

PREFILL_TOKENS = 256  # read together: enough rows for a matrix product to run near its peak


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


class Token(NamedTuple):
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


class Engine:
    """Slots for `width` requests: finished rows leave, waiting prompts enter.

    stop_id: the token, or the tokens, that end an answer. context: prompt and answer together, when the cache should
    hold less than the model's whole context (it takes 2 · layers · width · context · K · D numbers).
    precision: of the matrix products on a CPU. Below fp32 it is another distribution that is sampled, a little off the
    model's; the log-probabilities are of that one.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        stop_id: int | Collection[int],
        width: int = 32,
        context: int | None = None,
        precision: Precision = "fp32",
    ) -> None:
        """Raises ValueError for a width below 1, or a precision that is none of fp32, bf16 and int8 or that the device does
        not offer."""
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        if precision not in PRODUCTS:
            raise ValueError(f"precision must be one of {', '.join(PRODUCTS)}, not {precision}")
        self.stop_ids = frozenset([stop_id] if isinstance(stop_id, int) else stop_id)
        self.model, self.width = model.eval(), width
        self.context = min(context or model.config.context_length, model.config.context_length)
        self.slots: list[Request | None] = [None] * width
        self.limits = np.zeros(width, dtype=np.int64)  # tokens that each row may still get
        self.waiting: deque[Request] = deque()
        self.device = model.embedding.weight.device
        self.decoder: CpuDecoder | DeviceDecoder
        if self.device.type == "cpu":
            self.decoder = CpuDecoder(model, width, self.context, _together(width, SPAN), precision)
        elif precision != "fp32":
            raise ValueError(f"precision {precision} is for CPUs; on {self.device.type} the model's own type decides")
        else:
            self.decoder = DeviceDecoder(model, width, self.context)

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
        for row, request in enumerate(self.slots):
            if request and request.id == request_id:
                self._free(row)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Admit waiting prompts into free slots, then sample one token for every request under way."""
        out = []
        while self.waiting and self.slots.count(None) >= self._block():
            out += self._admit()
        if any(self.slots):
            decoder = self.decoder
            ids, logprobs = decoder.step(self._gather(decoder)) if isinstance(decoder, CpuDecoder) else decoder.step()
            out += self._collect(range(len(ids)), ids, logprobs)
        return out

    def _block(self) -> int:
        """How many slots must be free before prompts are read: under load a whole block's, a lone prompt's at once."""
        return min(_together(self.width, self._padded(self.waiting[0])), len(self.waiting))

    def _padded(self, request: Request) -> int:
        """The length that the prompt is read at, which is its own affair alone."""
        return _round_up(len(request.prompt), self.context)

    def _admit(self) -> list[Token]:
        """Read waiting prompts of one padded length into free slots, and sample their first tokens.

        The block has the same shape however many there are; what pads it comes after, so no prompt sees it.
        """
        longest = self._padded(self.waiting[0])
        block = _together(self.width, longest)
        free = [row for row, slot in enumerate(self.slots) if slot is None][:block]
        chosen: list[Request] = []
        others: list[Request] = []
        while self.waiting and len(chosen) < len(free):
            request = self.waiting.popleft()
            (chosen if self._padded(request) == longest else others).append(request)
        self.waiting.extendleft(reversed(others))
        tokens = np.zeros((block, longest), dtype=np.int64)
        rows, samplings = free[: len(chosen)], []
        for i, (row, request) in enumerate(zip(rows, chosen, strict=True)):
            tokens[i, : len(request.prompt)] = request.prompt
            self.slots[row] = request
            self.limits[row] = min(request.max_new_tokens, self.context - len(request.prompt))
            numbers = np.random.Generator(np.random.Philox(request.seed)).random(self.limits[row])
            samplings.append(Sampling(request.temperature, request.top_k, request.top_p, numbers))
        ids, logprobs = self.decoder.read(tokens, rows, [len(request.prompt) for request in chosen], samplings)
        return self._collect(rows, ids, logprobs)

    def _gather(self, decoder: CpuDecoder) -> int:
        """Bring the requests under way into as few rows as the decoder can compute; returns that number."""
        live = [row for row, slot in enumerate(self.slots) if slot]
        height = next(h for h in decoder.heights if h >= len(live))
        free = iter([row for row in range(height) if self.slots[row] is None])
        for row in live:
            if row >= height:
                target = next(free)
                decoder.move(row, target)
                self.slots[target], self.limits[target] = self.slots[row], self.limits[row]
                self.slots[row] = None
        return height

    def _collect(self, rows: Iterable[int], ids: Ints, logprobs: Doubles) -> list[Token]:
        """What was sampled for rows, without the idle ones; frees what has ended."""
        out = []
        for row, id, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
            request = self.slots[row]
            if request is None:
                continue
            self.limits[row] -= 1
            reason = "stop" if id in self.stop_ids else None if self.limits[row] else "length"
            if reason:
                self._free(row)
            out.append(Token(request.id, id, logprob, reason))
        return out

    def _free(self, row: int) -> None:
        self.slots[row] = None
        self.decoder.end(row)


def _round_up(length: int, context: int) -> int:
    """The next multiple of SPAN, or the context where that is shorter."""
    return min(context, -(-length // SPAN) * SPAN)


def _together(width: int, length: int) -> int:
    """How many prompts of a padded length are read together: few when they are long, so that none waits for much."""
    return max(1, min(width, PREFILL_TOKENS // length))


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
    precision: Precision = "fp32",
) -> list[Answer]:
    """Continue every prompt, `width` at a time; seeds[i] drives prompt i. Raises ValueError as Engine does."""
    longest = max((len(prompt) for prompt in prompts), default=1) + max_new_tokens
    context = _round_up(longest, model.config.context_length)
    engine = Engine(model, stop_id=stop_id, width=width, context=context, precision=precision)
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
