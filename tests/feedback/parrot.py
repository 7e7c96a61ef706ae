"""A server of OpenAI's chat completions that says again what it was told: for pages, where what is answered must be known.

"answer N times: TEXT" is answered with "No. N: TEXT", counting up, so that two answers to one question differ; a question that
begins with "slowly" is answered word by word, with a pause of 50 ms after each.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Parrot(BaseHTTPRequestHandler):
    """GET /v1/models and POST /v1/chat/completions, whole or streamed."""

    protocol_version = "HTTP/1.1"
    numbers = itertools.count(1)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def reply(self, body: bytes, kind: str = "application/json") -> None:
        """200 with a body."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """The one model."""
        card = {"id": "parrot", "object": "model", "owned_by": "tests"}
        self.reply(json.dumps({"object": "list", "data": [card]}).encode())

    def do_POST(self) -> None:
        """Say it again."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        wish = body["messages"][-1]["content"]
        _, counted, rest = wish.partition("answer N times: ")
        text = f"No. {next(self.numbers)}: {rest}" if counted else wish
        if not body.get("stream"):
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 2, "completion_tokens": 4}
            self.reply(json.dumps({"choices": [choice], "usage": usage}).encode())
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        pieces = [f"{word} " for word in text.split(" ")] if wish.startswith("slowly") else [text]
        for event in self.events(pieces):
            self.wfile.write(f"data: {event}\n\n".encode())
            self.wfile.flush()
        self.close_connection = True

    def events(self, pieces: list[str]) -> Iterator[str]:
        """The stream's events."""
        for piece in pieces:
            yield json.dumps({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            if len(pieces) > 1:
                time.sleep(0.05)
        yield json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield json.dumps({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 4}})
        yield "[DONE]"


class ParrotServer:
    """A parrot on a free port; close it. `url` ends in /v1."""

    def __init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Parrot)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End it."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
