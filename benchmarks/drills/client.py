"""A client of HTTP/1.1 that costs little: it shares two cores with the service that it measures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Response:
    """status, headers with lower-case names, and the body's bytes."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


class Broken(ConnectionError):
    """No whole answer came: whether the request was carried out is not known."""


class Client:
    """One connection that is kept, and made anew after it broke."""

    def __init__(self, port: int, seconds: float = 30.0) -> None:
        """seconds: how long an answer may take."""
        self.port, self.seconds = port, seconds
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Send a request and read its answer. Raises Broken when the connection breaks or nothing comes in time."""
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}"]
        lines += ["Content-Type: application/json"] if data else []
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        message = "\r\n".join([*lines, "", ""]).encode() + data
        try:
            async with asyncio.timeout(self.seconds):
                return await self._exchange(message)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError) as error:
            self.close()
            raise Broken(str(error) or type(error).__name__) from error

    async def _exchange(self, message: bytes) -> Response:
        if self.writer is None or self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(message)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {}
        for line in head[1:-2]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("connection") == "close":
            self.close()
        return Response(int(head[0].split(" ", 2)[1]), headers, body)

    def close(self) -> None:
        """Close the connection; the next request makes another."""
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None
