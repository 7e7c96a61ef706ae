"""The engine that answers: what the service needs of one, and ours, our decoder in a worker process of its own.

The service never imports torch: it speaks to `python -m feedback.decoder` over a socket, in the messages below.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from feedback.logprobs import Token


@dataclass(frozen=True)
class Load:
    """To the worker: read this model folder and answer with it."""

    model_hash: str
    folder: str


@dataclass(frozen=True)
class Ask:
    """To the worker: answer these messages. Without `stream` only the finished answer comes back."""

    id: str
    messages: list[dict[str, str]]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    logprobs: bool = False


@dataclass(frozen=True)
class Cancel:
    """To the worker: nobody waits for this answer any more."""

    id: str


@dataclass(frozen=True)
class Loaded:
    """From the worker: this model answers from now on."""

    model_hash: str
    context_length: int


@dataclass(frozen=True)
class LoadFailed:
    """From the worker: the model could not be read; the one before goes on answering."""

    model_hash: str
    message: str


@dataclass(frozen=True)
class Started:
    """From the worker, for a streamed answer: which model answers, and the prompt as it reads it."""

    id: str
    model_hash: str
    prompt_ids: list[int]


@dataclass(frozen=True)
class Piece:
    """From the worker, for a streamed answer: text that may be shown, and all token ids so far.

    tokens: with Ask.logprobs, those that came since the piece before.
    """

    id: str
    text: str
    ids: list[int]
    tokens: list[Token] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """From the worker: the whole answer; `ids` has the stop token when it was sampled, `logprobs` are in nats.

    tokens: with Ask.logprobs, those of the text, without special ones; of a streamed answer those that no piece brought.
    """

    id: str
    model_hash: str
    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str
    prompt_tokens: int = 0  # where the counts are told without the ids
    completion_tokens: int = 0
    tokens: list[Token] = field(default_factory=list)


@dataclass(frozen=True)
class Failed:
    """From the worker: there will be no answer. code: "invalid", "context_length_exceeded" or "engine_stopped"."""

    id: str
    code: str
    message: str


class EngineError(Exception):
    """No answer can be given; `code` as in Failed, or "not_ready"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Engine(Protocol):
    """What the service needs of whatever answers. kind: what the column `origin` of its answers says."""

    kind: str

    @property
    def model_hash(self) -> str | None:
        """The model that answers new requests, None before the first load."""

    async def load(self, model_hash: str, folder: Path) -> None:
        """Answer with another model from now on; answers under way finish on theirs. Raises EngineError, OSError."""

    def answer(self, ask: Ask) -> AsyncGenerator[Started | Piece | Done, None]:
        """Started, pieces, and at the end the whole answer (only that without `stream`). Raises EngineError.

        Closing the iterator cancels the answer.
        """

    async def close(self) -> None:
        """End it."""


class DecoderEngine:
    """Our decoder in a worker process; see feedback.decoder. To be used from one event loop."""

    kind = "decoder"

    def __init__(self, threads: int = 1, width: int = 32) -> None:
        """threads: torch's; width: answers decoded side by side."""
        self.threads, self.width = threads, width
        self.context_length = 0
        self._hash: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._inboxes: dict[str, asyncio.Queue[Any]] = {}
        self._loading: dict[str, asyncio.Future[None]] = {}

    @property
    def model_hash(self) -> str | None:
        """The model that answers new requests, None before the first load and after the worker has died."""
        return self._hash

    async def load(self, model_hash: str, folder: Path) -> None:
        """See Engine.load. Starts the worker when there is none."""
        if self._connection is None:
            self._start()
        future = asyncio.get_running_loop().create_future()
        self._loading[model_hash] = future
        self._send(Load(model_hash, str(folder)))
        await future

    async def answer(self, ask: Ask) -> AsyncGenerator[Started | Piece | Done, None]:
        """See Engine.answer."""
        if self._hash is None:
            raise EngineError("not_ready", "no model is loaded yet; try again in a moment")
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._inboxes[ask.id] = inbox
        finished = False
        try:
            self._send(ask)
            while not finished:
                message = await inbox.get()
                finished = isinstance(message, Done | Failed)
                if isinstance(message, Failed):
                    raise EngineError(message.code, message.message)
                yield message
        finally:
            self._inboxes.pop(ask.id, None)
            if not finished and self._connection is not None:
                self._send(Cancel(ask.id))

    async def close(self) -> None:
        """End the worker: closing the connection tells it."""
        process, connection = self._process, self._connection
        self._process = self._connection = self._hash = None
        if connection is not None:
            _shut(connection)
        if process is not None:
            try:
                await asyncio.to_thread(process.wait, 5)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "feedback.decoder", str(theirs.fileno()), str(self.threads), str(self.width)]
        env = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        root = str(Path(__file__).parent.parent)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
        # its own session: an interrupt in the terminal goes to the service, which closes the connection
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=env, start_new_session=True)
        theirs.close()
        self._connection = Connection(ours.detach())
        args = (self._connection, asyncio.get_running_loop())
        threading.Thread(target=self._listen, args=args, daemon=True, name="engine").start()

    def _send(self, message: Any) -> None:
        """Raises EngineError when the worker is gone."""
        try:
            if self._connection is None:
                raise BrokenPipeError
            self._connection.send(message)
        except OSError as error:
            raise EngineError("engine_stopped", "the engine stopped; it is being started again") from error

    def _listen(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: hand the worker's messages to the event loop, until it ends."""
        try:
            while True:
                loop.call_soon_threadsafe(self._dispatch, connection.recv())
        except (EOFError, OSError, RuntimeError):
            pass
        try:
            loop.call_soon_threadsafe(self._gone, connection)
        except RuntimeError:  # the loop has ended too
            return

    def _dispatch(self, messages: Sequence[Any]) -> None:
        for message in messages:
            if isinstance(message, Loaded):
                self._hash, self.context_length = message.model_hash, message.context_length
                self._settle(message.model_hash, None)
            elif isinstance(message, LoadFailed):
                self._settle(message.model_hash, EngineError("load_failed", message.message))
            elif inbox := self._inboxes.get(message.id):
                inbox.put_nowait(message)

    def _settle(self, model_hash: str, error: EngineError | None) -> None:
        future = self._loading.pop(model_hash, None)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _gone(self, connection: Connection) -> None:
        """The worker ended: whoever waits for it is told, and the next load starts another one."""
        if connection is self._connection:
            self._connection = self._process = self._hash = None
            connection.close()
        text = "the engine stopped before the answer was finished"
        for id, inbox in self._inboxes.items():
            inbox.put_nowait(Failed(id, "engine_stopped", text))
        for model_hash in list(self._loading):
            self._settle(model_hash, EngineError("engine_stopped", "the engine stopped while it read the model"))


def _shut(connection: Connection) -> None:
    """Wake the thread that listens (closing alone would leave it waiting), and tell the worker."""
    with socket.socket(fileno=os.dup(connection.fileno())) as twin:
        twin.shutdown(socket.SHUT_RDWR)
