"""Answers that our decoder did not give, in the token ids of the model that learns from them.

A server by URL tells ids of its own tokenizer or none, an imported log tells none. Their text is tokenised here, when the
snapshot is written, by the tokenizer of the model that the reward model and the policy begin from; the rows say so
(`tokenised`). Ids that our own decoder sampled are never touched: tokenised again, a text may become other ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from feedback.lessons import Answer


class Reader(Protocol):
    """What is needed of a tokenizer; models.tokenizer has it."""

    @property
    def stop_id(self) -> int:
        """The token that ends an answer."""

    def encode(self, text: str) -> list[int]:
        """Text to ids."""

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation to ids, up to where the answer begins. Raises ValueError."""

    def decode(self, ids: list[int]) -> str:
        """Ids to text."""


class Retelling:
    """Puts answers into ids. `open_reader` gives the tokenizer and how many tokens the model reads; asked when needed.

    left_out: answers that have no ids, by reason: "too_long" for the model, "no_template" for their messages.
    """

    def __init__(self, open_reader: Callable[[], tuple[Reader, int]]) -> None:
        self.open_reader = open_reader
        self.left_out: Counter[str] = Counter()
        self._reader: tuple[Reader, int] | None = None

    def reader(self) -> tuple[Reader, int]:
        """The tokenizer, opened once, and how many tokens the model reads."""
        if self._reader is None:
            self._reader = self.open_reader()
        return self._reader

    def written(self, prompt_ids: list[int], text: str) -> list[int] | None:
        """An answer that a person wrote, in ids, with the token that ends it; None when it is too long for the model."""
        reader, context = self.reader()
        ids = [*reader.encode(text), reader.stop_id]
        if len(prompt_ids) + len(ids) > context:
            self.left_out["too_long"] += 1
            return None
        return ids

    def __call__(self, answer: Answer) -> Answer:
        """The answer in ids that the model reads; without any when it cannot read it."""
        if answer.origin == "decoder":
            return answer
        reader, context = self.reader()
        nothing = replace(answer, prompt_ids=[], response_ids=[])
        try:
            prompt = reader.encode_chat(answer.messages)
        except ValueError:
            self.left_out["no_template"] += 1
            return nothing
        if (
            prompt == answer.prompt_ids
            and answer.response_ids
            and reader.decode(answer.response_ids) == answer.response
        ):
            return replace(answer, ours=True)  # the server has our tokenizer: these are the ids that were sampled
        ended = [reader.stop_id] if answer.finish_reason == "stop" else []
        response = [*reader.encode(answer.response), *ended]
        if len(prompt) + len(response) > context:
            self.left_out["too_long"] += 1
            return nothing
        return replace(answer, prompt_ids=prompt, response_ids=response, ours=True, tokenised=True)
