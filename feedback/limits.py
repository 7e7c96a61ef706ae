"""How much one caller may ask for: token buckets in memory, and a body that is neither too large nor too slow."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

BUCKETS = 65_536  # remembered at once; the longest unused is forgotten first


class Buckets:
    """Token buckets by name. Each holds `burst` tokens at most and gains `rate` a second; a rate of 0 is no limit."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self.clock = rate, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # name -> (tokens, as of)

    def take(self, name: str) -> float:
        """Take a token; returns 0, or the seconds until there is one (and takes none)."""
        if self.rate <= 0:
            return 0.0
        now = self.clock()
        tokens, since = self._buckets.pop(name, (float(self.burst), now))
        tokens = min(self.burst, tokens + (now - since) * self.rate)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self.rate
        self._buckets[name] = (tokens if wait else tokens - 1, now)
        if len(self._buckets) > BUCKETS:
            self._buckets.popitem(last=False)
        return wait


def address_name(host: str) -> str:
    """What an address is counted under: itself, or the /64 of an IPv6 address (whoever has one has all of it)."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return host


def bounded(receive: Receive, limit: int, seconds: float) -> Receive:
    """`receive`, counting a request's body while it comes in.

    Raises HTTPException 413 beyond `limit` bytes, and 408 when the whole body has not come within `seconds`.
    """
    taken, ended, deadline = 0, False, time.monotonic() + seconds

    async def counted() -> Message:
        nonlocal taken, ended
        if ended:  # the wait for a disconnection may be long
            return await receive()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                message = await receive()
        except TimeoutError:
            text = f"the request's body did not arrive within {seconds:g} s"
            raise HTTPException(408, text, headers={"Connection": "close"}) from None
        taken += len(message.get("body", b""))
        ended = not message.get("more_body", False)
        if taken > limit:
            raise too_large(limit)
        return message

    return counted


def too_large(limit: int) -> HTTPException:
    """413, and the connection ends: what still comes is not read."""
    text = f"the request's body has more than {limit} bytes (THUMBWHEEL_BODY_LIMIT)"
    return HTTPException(413, text, headers={"Connection": "close"})
