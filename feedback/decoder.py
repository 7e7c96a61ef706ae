"""The worker process behind the engine: our decoder, and the only code of this room that imports torch.

    python -m feedback.decoder DESCRIPTOR THREADS WIDTH

Talks over the socket DESCRIPTOR in the messages of `feedback.engine`, and ends when the other side does. Requests are
answered by continuous batching; a new model is loaded beside the old one, which finishes what it began.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from feedback.engine import Ask, Cancel, Done, Failed, Load, Loaded, LoadFailed, Piece, Started
from feedback.logprobs import Token, bytes_of
from models.checkpoint import load_model, model_hash
from models.rollout import Engine, Request
from models.tokenizer import Tokenizer

CONTEXT = 2048  # tokens of a conversation with its answer: memory for `width` of them is set aside


@dataclass
class Model:
    """A loaded model, and what it is answering."""

    hash: str
    tokenizer: Tokenizer
    engine: Engine
    context: int
    answers: dict[str, Answer] = field(default_factory=dict)


class Answer:
    """One answer under way: turns token ids into text that may be shown already."""

    def __init__(self, ask: Ask, prompt_ids: list[int], tokenizer: Tokenizer) -> None:
        self.ask, self.prompt_ids, self.tokenizer = ask, prompt_ids, tokenizer
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.tokens: list[Token] = []  # with Ask.logprobs: those not yet handed over
        self.sent = 0
        self.text = ""
        self.keep = max((len(stop) - 1 for stop in ask.stop), default=0)

    def add(self, id: int, logprob: float, finished: bool) -> tuple[str, bool]:
        """Take a token; returns the text that may be shown now, and whether a stop string ended the answer.

        Text is held back while it could still become a stop string, or ends within a character's bytes.
        """
        self.ids.append(id)
        self.logprobs.append(logprob)
        if self.ask.logprobs:
            text, named = self.tokenizer.decode([id]), self.tokenizer.decode([id], skip_special=False)
            if text == named:  # a special token, as the one that ends an answer, is none of the message's
                self.tokens.append(Token(bytes_of(self.tokenizer.inner.id_to_token(id), text), logprob))
        if not (self.ask.stream or self.ask.stop or finished):
            return "", False
        self.text = self.tokenizer.decode(self.ids).replace("\0", "\ufffd")  # PostgreSQL keeps no NUL
        found = [at for at in (self.text.find(stop) for stop in self.ask.stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
        end = len(self.text)
        if not (finished or found):
            end = len(self.text.rstrip("\ufffd")) - self.keep
        piece = self.text[self.sent : max(end, self.sent)]
        self.sent += len(piece)
        return piece, bool(found)

    def told(self) -> list[Token]:
        """The tokens that were not handed over yet."""
        tokens, self.tokens = self.tokens, []
        return tokens


class Decoder:
    """Answers what comes over the connection, step by step."""

    def __init__(self, connection: Connection, width: int) -> None:
        self.connection, self.width = connection, width
        self.models: list[Model] = []  # the last one answers what is new
        self.ready: queue.SimpleQueue[Model | LoadFailed] = queue.SimpleQueue()
        self.outbox: list[Any] = []

    def run(self) -> None:
        """Serve until the other side closes the connection."""
        while True:
            busy = any(model.engine.busy for model in self.models)
            # a load under way is looked for ten times a second
            if self.connection.poll(0 if busy else 0.1):
                self.take(self.connection.recv())
                while self.connection.poll(0):
                    self.take(self.connection.recv())
            self.adopt()
            for model in self.models:
                if model.engine.busy:
                    self.step(model)
            self.models = [m for m in self.models if m is self.models[-1] or m.engine.busy]
            if self.outbox:
                self.connection.send(self.outbox)
                self.outbox = []

    def take(self, message: Any) -> None:
        """One message of the service."""
        if isinstance(message, Load):
            threading.Thread(target=self.load, args=(message,), daemon=True).start()
        elif isinstance(message, Ask):
            try:
                self.ask(message)
            except ValueError as error:
                self.outbox.append(Failed(message.id, "invalid", str(error)))
        elif isinstance(message, Cancel):
            for model in self.models:
                if model.answers.pop(message.id, None):
                    model.engine.cancel(message.id)

    def load(self, message: Load) -> None:
        """Read a model beside those that answer (in a thread of its own), and check that it is the one meant."""
        try:
            found = model_hash(message.folder)
            if found != message.model_hash:
                raise ValueError(f"{message.folder} holds model {found[:12]}, not {message.model_hash[:12]}")
            model, tokenizer = load_model(message.folder), Tokenizer.load(message.folder)
            engine = Engine(model, stop_id=tokenizer.stop_ids, width=self.width, context=CONTEXT)
            self.ready.put(Model(message.model_hash, tokenizer, engine, engine.context))
        except Exception as error:
            self.ready.put(LoadFailed(message.model_hash, f"{type(error).__name__}: {error}"))

    def adopt(self) -> None:
        """Let models that have been loaded answer from now on."""
        while not self.ready.empty():
            loaded = self.ready.get()
            if isinstance(loaded, LoadFailed):
                self.outbox.append(loaded)
                continue
            self.models.append(loaded)
            self.outbox.append(Loaded(loaded.hash, loaded.context))

    def ask(self, ask: Ask) -> None:
        """Begin an answer. Raises ValueError when the prompt does not fit."""
        if not self.models:
            raise ValueError("no model is loaded yet")
        model = self.models[-1]
        prompt = model.tokenizer.encode_chat(ask.messages)
        room = model.context - len(prompt)
        if room < 1:
            text = f"the conversation has {len(prompt)} tokens; the model reads at most {model.context - 1}"
            self.outbox.append(Failed(ask.id, "context_length_exceeded", text))
            return
        request = Request(
            id=ask.id,
            prompt=prompt,
            max_new_tokens=min(ask.max_tokens, room),
            temperature=ask.temperature,
            top_p=ask.top_p,
            seed=ask.seed,
        )
        model.engine.submit(request)
        model.answers[ask.id] = Answer(ask, prompt, model.tokenizer)
        if ask.stream:
            self.outbox.append(Started(ask.id, model.hash, prompt))

    def step(self, model: Model) -> None:
        """One token for every answer of a model."""
        for token in model.engine.step():
            answer = model.answers.get(token.request_id)
            if answer is None:  # cancelled by a stop string within this step
                continue
            piece, stopped = answer.add(token.id, token.logprob, token.finish_reason is not None)
            if answer.ask.stream and piece:
                self.outbox.append(Piece(token.request_id, piece, list(answer.ids), answer.told()))
            reason = "stop" if stopped else token.finish_reason
            if reason is None:
                continue
            del model.answers[token.request_id]
            if stopped and token.finish_reason is None:
                model.engine.cancel(token.request_id)
            said = (answer.prompt_ids, answer.ids, answer.logprobs, answer.text, reason)
            self.outbox.append(Done(token.request_id, model.hash, *said, tokens=answer.told()))


def main(descriptor: int, threads: int, width: int) -> None:
    """Serve one connection; an interrupt is the service's to handle, which then closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        Decoder(Connection(descriptor), width).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # no clean-up: a thread may be reading a model, and nothing here needs saving
        os._exit(0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
