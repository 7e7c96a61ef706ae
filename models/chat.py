"""A conversation with a checkpoint: parameters and something to run them is all that a language model is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.checkpoint import load_model
from models.gguf_file import load_gguf
from models.rollout import Engine, Request
from models.tokenizer import HuggingFaceTokenizer, Tokenizer
from models.training import stream
from models.transformer import Transformer


@dataclass(frozen=True)
class ChatOptions:
    """How answers are sampled: temperature 0 is greedy, top_k 0 and top_p 1 switch those filters off. max_new_tokens: of one
    answer; context: tokens that are remembered, never more than the model reads. system: the system message, "" for none.
    complete: what is written is continued, not answered."""

    max_new_tokens: int = 256
    context: int = 4096
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    system: str = ""
    complete: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature {self.temperature} and top_k {self.top_k} must not be negative, top_p {self.top_p} must be "
                "above 0 and at most 1"
            )


class Chat:
    """A conversation that remembers what was said, as far as the model's context goes.

    forgotten: how many of the oldest messages no longer fit the context and are not read any more.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, options: ChatOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        if not options.complete and isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.template is None:
            raise ValueError(
                f"{tokenizer.where}: the tokenizer has no chat template, so this model only completes: use --complete, or "
                "add chat_template.jinja"
            )
        self.engine = Engine(model, stop_id=tokenizer.stop_ids, width=1, context=options.context)
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        system = self.options.system
        self.messages = [{"role": "system", "content": system}] if system else []
        self.forgotten = self.turns = 0

    def answer(self, text: str) -> Iterator[str]:
        """What the model says to `text`, piece by piece; whoever stops reading stops the model, and what was said stays said.

        Raises ValueError when `text` alone is longer than the context.
        """
        o = self.options
        prompt = self._completing(text) if o.complete else self._asking(text)
        room = self.engine.context - len(prompt)
        seed = int(stream(o.seed, "chat", self.turns).integers(2**62))
        self.turns += 1
        self.engine.submit(Request("chat", prompt, min(o.max_new_tokens, room), o.temperature, o.top_p, o.top_k, seed))
        ids: list[int] = []
        said = ""
        try:
            while self.engine.busy:
                tokens = self.engine.step()
                ids += [token.id for token in tokens]
                whole = self.tokenizer.decode(ids)
                if tokens[-1].finish_reason is None:
                    whole = whole.rstrip("\ufffd")  # a character whose last bytes are still to come
                piece, said = whole[len(said) :], whole
                if piece:
                    yield piece
        finally:
            self.engine.cancel("chat")
            if not o.complete:
                self.messages.append({"role": "assistant", "content": said})

    def _completing(self, text: str) -> list[int]:
        ids = [self.tokenizer.end_of_text_id, *self.tokenizer.encode(text)]
        if len(ids) >= self.engine.context:
            raise ValueError(f"the text has {len(ids)} tokens; the model reads at most {self.engine.context - 1}")
        return ids

    def _asking(self, text: str) -> list[int]:
        """The conversation with `text` as the user's next message, without its oldest turns where it is too long."""
        messages = [*self.messages, {"role": "user", "content": text}]
        first = 1 if self.options.system else 0
        reserve = min(self.options.max_new_tokens, self.engine.context // 4)
        gone = 0
        while True:
            ids = self.tokenizer.encode_chat(messages)
            if len(ids) + reserve <= self.engine.context or len(messages) <= first + 1:
                break
            del messages[first : first + 2]  # a question and its answer
            gone += 2
        if len(ids) >= self.engine.context:
            raise ValueError(f"the message has {len(ids)} tokens; the model reads at most {self.engine.context - 1}")
        self.messages = messages
        self.forgotten += gone
        return ids


def open_chat(source: Path, options: ChatOptions) -> Chat:
    """A chat with a folder in Hugging Face's format, or a *.gguf. Raises FileNotFoundError, ImportError, ValueError."""
    if source.suffix == ".gguf":
        return Chat(*load_gguf(source), options)
    return Chat(load_model(source), Tokenizer.load(source), options)
